"""Where each field of a frame lies: structs, offsets and word indices, from the structures of the layout.

The structures are those of :mod:`shmbroker.memory.layout`; a test compares every offset here with them.
"""

from __future__ import annotations

import struct

from shmbroker.memory import layout

SUBMISSION_HEADER = struct.Struct(f"<QQQQ{layout.MAX_TENSORS}IIHHII")
"""sequence, call_id, deadline_ns, submitted_ns, generations, op_id, input_count, output_count, flags, metadata_bytes"""
DESCRIPTOR = struct.Struct("<QQBBBBI8q8q")
"""offset, nbytes, dtype, ndim, space, flags, reserved, shape, strides"""
COMPLETION_HEADER = struct.Struct("<QQI4xI4xQQ16x")
"""sequence, call_id, status, text_bytes, queued_ns, compute_ns"""
OFFSET_AND_NBYTES = struct.Struct("<QQ")
"""How a descriptor begins."""
ID_AND_TIMES = struct.Struct("<QQQ")
"""call_id, deadline_ns, submitted_ns: how a submission begins, behind its sequence number."""

HEADER_BYTES = SUBMISSION_HEADER.size
HEAD_BYTES = COMPLETION_HEADER.size
OP_OFFSET = layout.offset_of(layout.SubmissionFrame, "op_id")
INPUT_COUNT_OFFSET = layout.offset_of(layout.SubmissionFrame, "input_count")
OUTPUT_COUNT_OFFSET = layout.offset_of(layout.SubmissionFrame, "output_count")
METADATA_OFFSET = layout.offset_of(layout.SubmissionFrame, "metadata")
BODY_OFFSET = layout.offset_of(layout.CompletionFrame, "body")
FORM_OFFSET = layout.offset_of(layout.TensorDescriptor, "dtype")

# Indices of 64-bit words, and of 32-bit halves, of a frame.
SEQUENCE_WORD = 0
CALL_ID_WORD = 1
DEADLINE_WORD = layout.offset_of(layout.SubmissionFrame, "deadline_ns") // 8
SUBMITTED_WORD = layout.offset_of(layout.SubmissionFrame, "submitted_ns") // 8
FIRST_GENERATION_HALF = layout.offset_of(layout.SubmissionFrame, "generations") // 4
STATUS_WORD = layout.offset_of(layout.CompletionFrame, "status") // 8
STATUS_HALF = layout.offset_of(layout.CompletionFrame, "status") // 4
TEXT_WORD = layout.offset_of(layout.CompletionFrame, "text_bytes") // 8
QUEUED_WORD = layout.offset_of(layout.CompletionFrame, "queued_ns") // 8
COMPUTE_WORD = layout.offset_of(layout.CompletionFrame, "compute_ns") // 8

KEPT_OP = 0
"""The op id of calls about kept tensors themselves: with outputs each input is copied to the output of its place, without they are let go."""
