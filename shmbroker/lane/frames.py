"""Frames: how a call and its outcome are written, and how a reader checks what it cannot trust.

F1  A reader copies a frame out of shared memory before it looks at it: the other side can change it meanwhile.
F2  Nothing in a frame is believed before it was checked: counts, dtype, dimensions, strides' reach, bounds, alignment.
F3  A tensor's form (dtype, shape, strides) is checked once and remembered by its bytes; so may be a whole frame, by all its bytes from
    ``op_id`` on, and all but its tensors' places, by all of these but the offsets. Whatever else differs in one byte is checked anew.

The structures are those of :mod:`shmbroker.memory.layout`; a test compares every offset used here with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shmbroker.arena.spec import CODE_OF, TensorSpec
from shmbroker.errors import BadInput
from shmbroker.lane.frame_layout import (
    CALL_ID_WORD,
    DEADLINE_WORD,
    DESCRIPTOR,
    FIRST_GENERATION_HALF,
    HEAD_BYTES,
    HEADER_BYTES,
    ID_AND_TIMES,
    INPUT_COUNT_OFFSET,
    METADATA_OFFSET,
    OP_OFFSET,
    OUTPUT_COUNT_OFFSET,
    SUBMISSION_HEADER,
    SUBMITTED_WORD,
)
from shmbroker.memory import layout


class Slot:
    """Where a frame is written: the same memory as bytes, as native 64-bit words and as 32-bit halves.

    ``template`` is what was written last: the next call by the same template need write only what differs. A peer that meddles with the rest
    meddles with frames that only it reads.
    """

    __slots__ = ("bytes", "halves", "head", "template", "words")

    def __init__(self, memory: memoryview) -> None:
        self.bytes = memory
        self.head = memory[:HEAD_BYTES]
        self.words = memory.cast("Q")
        self.halves = memory.cast("I")
        self.template: FrameTemplate | None = None


def private_slot(nbytes: int) -> Slot:
    """A slot in private memory, for the lane that sends frames as messages."""
    return Slot(memoryview(bytearray(nbytes)))


class FrameTemplate:
    """A submission whose tensors' forms are known: all is packed beforehand but ids, times, offsets and generations."""

    __slots__ = ("_places", "nbytes", "packed", "tensor_count")

    def __init__(
        self,
        op_id: int,
        inputs: Sequence[tuple[TensorSpec, tuple[int, ...]]],
        outputs: Sequence[tuple[TensorSpec, tuple[int, ...]]],
        metadata: bytes = b"",
        spaces: Sequence[int] = (),
    ) -> None:
        """``inputs`` and ``outputs`` as pairs of spec and strides (elements), ``spaces`` of each where not all lie in the segment.

        Raises :class:`BadInput` for what no frame can carry.
        """
        tensors = [*inputs, *outputs]
        if len(tensors) > layout.MAX_TENSORS:
            raise BadInput(f"{len(tensors)} tensors in one call (inputs and outputs); a frame carries at most {layout.MAX_TENSORS}")
        if len(metadata) > layout.METADATA_BYTES:
            raise BadInput(
                f"{len(metadata)} bytes of per-call arguments; a frame carries at most {layout.METADATA_BYTES}: bind them instead"
            )
        frame = bytearray(layout.SUBMISSION_SLOT_BYTES)
        none = (0,) * layout.MAX_TENSORS
        SUBMISSION_HEADER.pack_into(frame, 0, 0, 0, 0, 0, *none, op_id, len(inputs), len(outputs), 0, len(metadata))
        places: list[tuple[int, int]] = []
        at = HEADER_BYTES
        for (spec, strides), space in zip(tensors, spaces or itertools.repeat(layout.Space.SEGMENT), strict=False):
            pad = (0,) * (layout.MAX_DIMS - len(spec.shape))
            code = int(CODE_OF[spec.dtype])
            DESCRIPTOR.pack_into(frame, at, 0, spec.nbytes, code, len(spec.shape), space, 0, 0, *spec.shape, *pad, *strides, *pad)
            places.append((at // 8, FIRST_GENERATION_HALF + len(places)))
            at += DESCRIPTOR.size
        self.nbytes = at
        if metadata:
            frame[METADATA_OFFSET : METADATA_OFFSET + len(metadata)] = metadata
            self.nbytes = layout.SUBMISSION_SLOT_BYTES
        self.tensor_count = len(tensors)
        self.packed = bytes(frame[8 : self.nbytes])
        self._places = tuple(places)
        """Of each tensor: the word of its offset, and the half of its generation."""

    def write(
        self, slot: Slot, call_id: int, deadline_ns: int, submitted_ns: int, offsets: Sequence[int], generations: Sequence[int]
    ) -> None:
        """Fill ``slot`` with everything but the sequence number; ``offsets`` and ``generations`` of each tensor, inputs first.

        Raises ValueError for a number that does not fit its field, and where there is not one for each tensor; TypeError for what is no integer.
        What has been written by then is written anew before anything is published.
        """
        count = self.tensor_count
        if len(offsets) != count or len(generations) != count:
            raise ValueError(f"{len(offsets)} offsets and {len(generations)} generations for a template of {count} tensors")
        if slot.template is not self:
            slot.bytes[8 : self.nbytes] = self.packed
            slot.template = self
        words, halves = slot.words, slot.halves
        words[CALL_ID_WORD] = call_id
        words[DEADLINE_WORD] = deadline_ns
        words[SUBMITTED_WORD] = submitted_ns
        for (word, half), offset, generation in zip(self._places, offsets, generations):  # noqa: B905 (strict costs half as much again)
            words[word] = offset
            halves[half] = generation


_CONSTANT_END = [HEADER_BYTES + min(count, layout.MAX_TENSORS) * DESCRIPTOR.size for count in range(2 * 256)]


def constant_part(frame: bytes) -> bytes:
    """What says, byte for byte, which op is to run on which tensors: from ``op_id`` to the last tensor. Per-call arguments lie behind it."""
    return frame[OP_OFFSET : _CONSTANT_END[frame[INPUT_COUNT_OFFSET] + frame[OUTPUT_COUNT_OFFSET]]]


Taken = tuple[int, int, int, bytes, bytes]
"""A submission as it is taken: call id, deadline_ns, submitted_ns, :func:`constant_part`, and the whole frame, a private copy (F1)."""


def taken_of(frame: bytes) -> Taken:
    """The same of a frame's private copy that is no shorter than its header."""
    call_id, deadline_ns, submitted_ns = ID_AND_TIMES.unpack_from(frame, 8)
    return call_id, deadline_ns, submitted_ns, constant_part(frame), frame
