"""Where each field of a frame is written and read: as the published structures have it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from shmbroker.arena.spec import TensorSpec, spec_of
from shmbroker.lane.frame_layout import CALL_ID_WORD, COMPLETION_HEADER, DESCRIPTOR, HEAD_BYTES, SEQUENCE_WORD, SUBMISSION_HEADER
from shmbroker.lane.frames import FrameTemplate, private_slot
from shmbroker.memory import layout
from shmbroker.memory.layout import CompletionFrame, SubmissionFrame, TensorDescriptor
from tests.lane.submissions import FIRST, OP_AT, TENSORS_AT

# What is packed: bytes, and what must be as long.
GOLDEN_PACKED = {
    "header of a submission": (SUBMISSION_HEADER.size, 96, SubmissionFrame.tensors.offset),
    "descriptor": (DESCRIPTOR.size, 152, ctypes.sizeof(TensorDescriptor)),
    "all descriptors": (layout.MAX_TENSORS * DESCRIPTOR.size, 1824, SubmissionFrame.tensors.size),
    "arguments": (layout.METADATA_BYTES, 128, SubmissionFrame.metadata.size),
    "submission": (layout.SUBMISSION_SLOT_BYTES, 2048, SubmissionFrame.metadata.offset + SubmissionFrame.metadata.size),
    "header of a completion": (COMPLETION_HEADER.size, 64, CompletionFrame.body.offset),
    "head of a completion": (HEAD_BYTES, 64, CompletionFrame.body.offset),
    "text": (layout.TEXT_BYTES, 960, CompletionFrame.body.size),
    "completion": (layout.COMPLETION_SLOT_BYTES, 1024, CompletionFrame.body.offset + CompletionFrame.body.size),
}


@pytest.mark.parametrize("what", GOLDEN_PACKED)
def test_packed_sizes_are_those_of_the_structures(what: str) -> None:
    packed, golden, structure = GOLDEN_PACKED[what]
    assert packed == golden == structure


def test_the_constant_part_begins_and_the_tensors_begin_where_the_layout_says() -> None:
    assert (SubmissionFrame.op_id.offset, SubmissionFrame.tensors.offset) == (OP_AT, TENSORS_AT)


def test_packed_submission_header_is_the_structures() -> None:
    times = [0x0101010101010100 + i for i in range(4)]
    generations = [0x80000000 + i for i in range(layout.MAX_TENSORS)]
    rest = [0x11223344, 0x5566, 0x7788, 0x99AABBCC, 0xDDEEFF00]
    packed = SUBMISSION_HEADER.pack(*times, *generations, *rest).ljust(layout.SUBMISSION_SLOT_BYTES, b"\0")
    frame = SubmissionFrame.from_buffer_copy(packed)
    assert [frame.sequence, frame.call_id, frame.deadline_ns, frame.submitted_ns] == times
    assert list(frame.generations) == generations
    assert [frame.op_id, frame.input_count, frame.output_count, frame.flags, frame.metadata_bytes] == rest
    assert not any(packed[SUBMISSION_HEADER.size :])


def test_packed_descriptor_is_the_structures() -> None:
    names = ["offset", "nbytes", "dtype", "ndim", "space", "flags", "reserved"]
    values = [1 << 60, 1 << 61, 200, 201, 202, 203, 1 << 31]
    dims = [*range(-8, 8)]
    descriptor = TensorDescriptor.from_buffer_copy(DESCRIPTOR.pack(*values, *dims))
    assert [getattr(descriptor, name) for name in names] == values
    assert [*descriptor.shape, *descriptor.strides] == dims


def test_packed_completion_header_is_the_structures() -> None:
    names = ["sequence", "call_id", "status", "text_bytes", "queued_ns", "compute_ns"]
    values = [1 << 60, 1 << 61, 1 << 31, 1 << 30, 1 << 58, 1 << 59]
    frame = CompletionFrame.from_buffer_copy(COMPLETION_HEADER.pack(*values).ljust(layout.COMPLETION_SLOT_BYTES, b"\0"))
    assert [getattr(frame, name) for name in names] == values
    assert (frame.reserved0, frame.reserved1, any(frame.reserved2)) == (0, 0, False)


def test_word_indices_are_those_of_the_structures() -> None:
    assert SEQUENCE_WORD * 8 == SubmissionFrame.sequence.offset == CompletionFrame.sequence.offset
    assert CALL_ID_WORD * 8 == SubmissionFrame.call_id.offset == CompletionFrame.call_id.offset


def test_a_written_frame_read_as_the_structure_has_every_field_in_its_place() -> None:
    tensor = torch.empty((3, 4, 5), dtype=torch.bfloat16)[1:, :, ::2]
    out = TensorSpec((2,), torch.bool)
    template = FrameTemplate(0x11223344, [(spec_of(tensor), tensor.stride())], [(out, (1,))], b"meta")
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1 << 60, 1 << 61, 1 << 62, [FIRST + 40, FIRST + 512], [0xFFFFFFFF, 2])
    frame = SubmissionFrame.from_buffer_copy(slot.bytes)
    assert (frame.sequence, frame.call_id, frame.op_id) == (0, 1 << 60, 0x11223344)
    assert (frame.input_count, frame.output_count, frame.flags, frame.metadata_bytes) == (1, 1, 0, 4)
    assert (frame.deadline_ns, frame.submitted_ns) == (1 << 61, 1 << 62)
    assert bytes(frame.metadata) == b"meta".ljust(layout.METADATA_BYTES, b"\0")
    first, second = frame.tensors[:2]
    assert list(frame.generations) == [0xFFFFFFFF, 2] + [0] * 10
    assert (first.offset, first.nbytes, first.reserved) == (FIRST + 40, 2 * 4 * 3 * 2, 0)
    assert (first.dtype, first.ndim, first.space, first.flags) == (layout.DTypeCode.BFLOAT16, 3, layout.Space.SEGMENT, 0)
    assert (list(first.shape), list(first.strides)) == ([2, 4, 3, 0, 0, 0, 0, 0], [20, 5, 2, 0, 0, 0, 0, 0])
    assert (second.offset, second.nbytes, second.dtype, second.ndim) == (FIRST + 512, 2, layout.DTypeCode.BOOL, 1)
    assert bytes(frame.tensors[2]) == bytes(ctypes.sizeof(TensorDescriptor))
