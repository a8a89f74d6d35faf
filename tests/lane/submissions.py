"""Submissions to read and to spoil: a reader and its arena, a frame that it accepts, where tensors may lie, what must hold of what is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.lane.frames import FrameTemplate, private_slot
from shmbroker.lane.submission_reader import Submission, SubmissionReader
from shmbroker.memory import layout
from shmbroker.memory.layout import SubmissionFrame
from tests.tensors import Tensor, reach

FIRST = 3 * layout.PAGE
END = FIRST + (1 << 20)
"""The arena of the readers in these tests, bytes from the start of a segment."""

INT64_MAX = (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1
UINT32_MAX = (1 << 32) - 1

OP_AT, TENSORS_AT = 80, 96
"""Where the constant part of a frame begins, and where its tensors do: golden, as in the tests of the layout."""


@st.composite
def placed(draw: st.DrawFn, tensor: Tensor) -> tuple[int, int]:
    """An offset and a generation for a tensor, anywhere in the arena."""
    spec, strides = tensor
    itemsize = spec.dtype.itemsize
    last = (END - reach(spec.shape, strides) * itemsize) // itemsize
    return draw(st.integers(-(-FIRST // itemsize), last)) * itemsize, draw(st.integers(0, UINT32_MAX))


def new_reader() -> SubmissionReader:
    return SubmissionReader(FIRST, END)


def valid_frame() -> SubmissionFrame:
    """A frame of two inputs and an output that every reader here accepts; tests spoil one field of it."""
    specs = [TensorSpec((2, 3), torch.float32), TensorSpec((4,), torch.int64), TensorSpec((), torch.float16)]
    template = FrameTemplate(7, [(spec, contiguous_strides(spec.shape)) for spec in specs[:2]], [(specs[2], ())], b"\x80")
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(
        slot, call_id=5, deadline_ns=0, submitted_ns=1, offsets=[FIRST, FIRST + 256, FIRST + 512], generations=[1, 2, UINT32_MAX]
    )
    return SubmissionFrame.from_buffer_copy(slot.bytes)


def apart(places: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Offsets and generations apart, as a template takes them."""
    return [offset for offset, _ in places], [generation for _, generation in places]


def check_all_inside(call: Submission) -> None:
    """F2, looked at from outside: whatever a reader lets through lies in the arena, and its bytes can be counted."""
    assert len(call.inputs) + len(call.outputs) <= layout.MAX_TENSORS
    assert len(call.metadata) <= layout.METADATA_BYTES
    for descriptor in (*call.inputs, *call.outputs):
        form = descriptor.form
        shape, itemsize = form.spec.shape, form.dtype.itemsize
        assert len(shape) == len(form.strides) <= layout.MAX_DIMS
        assert min((*shape, *form.strides), default=0) >= 0
        assert descriptor.offset >= FIRST
        assert descriptor.offset + reach(shape, form.strides) * itemsize <= END
        assert descriptor.offset % itemsize == 0
        assert form.extent_bytes == reach(shape, form.strides) * itemsize
        assert form.nbytes == math.prod(shape) * itemsize <= INT64_MAX
    assert len(call.generations) == len(call.inputs) + len(call.outputs)
