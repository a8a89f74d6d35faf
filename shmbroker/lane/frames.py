"""Frames: how a call and its outcome are written, and how a reader checks what it cannot trust.

F1  A reader copies a frame out of shared memory before it looks at it: the other side can change it meanwhile.
F2  Nothing in a frame is believed before it was checked: counts, dtype, dimensions, strides' reach, bounds, alignment.
F3  A tensor's form (dtype, shape, strides) is checked once and remembered by its bytes; so may be a whole frame, by all its bytes from
    ``op_id`` on. Whatever differs in one byte is checked anew.

The structures are those of :mod:`shmbroker.memory.layout`; a test compares every offset used here with them.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shmbroker.errors import BadFrame, BadInput
from shmbroker.memory import layout
from shmbroker.memory.spec import CODE_OF, DTYPE_OF, TensorSpec, contiguous_strides, extent_elements

SUBMISSION_HEADER = struct.Struct(f"<QQQQ{layout.MAX_TENSORS}IIHHII")
DESCRIPTOR = struct.Struct("<QQBBBBI8q8q")
COMPLETION_HEADER = struct.Struct("<QQI4xI4xQQ16x")
HEAD_BYTES = COMPLETION_HEADER.size

_HEADER_BYTES = SUBMISSION_HEADER.size
_OP_OFFSET = layout.offset_of(layout.SubmissionFrame, "op_id")
_INPUT_COUNT_OFFSET = layout.offset_of(layout.SubmissionFrame, "input_count")
_OUTPUT_COUNT_OFFSET = layout.offset_of(layout.SubmissionFrame, "output_count")
_METADATA_OFFSET = layout.offset_of(layout.SubmissionFrame, "metadata")
_BODY_OFFSET = layout.offset_of(layout.CompletionFrame, "body")
_FORM_OFFSET = layout.offset_of(layout.TensorDescriptor, "dtype")

# Indices of 64-bit words, and of 32-bit halves, of a frame.
SEQUENCE_WORD = 0
CALL_ID_WORD = 1
_DEADLINE_WORD = layout.offset_of(layout.SubmissionFrame, "deadline_ns") // 8
_SUBMITTED_WORD = layout.offset_of(layout.SubmissionFrame, "submitted_ns") // 8
_FIRST_GENERATION_HALF = layout.offset_of(layout.SubmissionFrame, "generations") // 4
_STATUS_WORD = layout.offset_of(layout.CompletionFrame, "status") // 8
_TEXT_WORD = layout.offset_of(layout.CompletionFrame, "text_bytes") // 8
_QUEUED_WORD = layout.offset_of(layout.CompletionFrame, "queued_ns") // 8
_COMPUTE_WORD = layout.offset_of(layout.CompletionFrame, "compute_ns") // 8

_PLACE = struct.Struct("<QQ")
_TIMES = struct.Struct("<QQQ")

_KNOWN_FORMS = 4096
"""Forms remembered; a process whose peer sends ever new ones starts over rather than growing."""

_INT64_MAX = (1 << 63) - 1
_SPACES = frozenset(layout.Space)


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

    __slots__ = ("_offset_words", "nbytes", "packed", "tensor_count")

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
        offset_words = []
        at = _HEADER_BYTES
        for (spec, strides), space in zip(tensors, spaces or itertools.repeat(layout.Space.SEGMENT), strict=False):
            pad = (0,) * (layout.MAX_DIMS - len(spec.shape))
            code = int(CODE_OF[spec.dtype])
            DESCRIPTOR.pack_into(frame, at, 0, spec.nbytes, code, len(spec.shape), space, 0, 0, *spec.shape, *pad, *strides, *pad)
            offset_words.append(at // 8)
            at += DESCRIPTOR.size
        self.nbytes = at
        if metadata:
            frame[_METADATA_OFFSET : _METADATA_OFFSET + len(metadata)] = metadata
            self.nbytes = layout.SUBMISSION_SLOT_BYTES
        self.tensor_count = len(tensors)
        self.packed = bytes(frame[8 : self.nbytes])
        self._offset_words = tuple(offset_words)

    def write(
        self, slot: Slot, call_id: int, deadline_ns: int, submitted_ns: int, offsets: Sequence[int], generations: Sequence[int]
    ) -> None:
        """Fill ``slot`` with everything but the sequence number; ``offsets`` and ``generations`` of each tensor, inputs first."""
        if slot.template is not self:
            slot.bytes[8 : self.nbytes] = self.packed
            slot.template = self
        words, halves = slot.words, slot.halves
        words[CALL_ID_WORD] = call_id
        words[_DEADLINE_WORD] = deadline_ns
        words[_SUBMITTED_WORD] = submitted_ns
        half = _FIRST_GENERATION_HALF
        for word, offset, generation in zip(self._offset_words, offsets, generations):  # noqa: B905 (strict costs a tenth of the call)
            words[word] = offset
            halves[half] = generation
            half += 1


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A checked dtype, shape and strides; ``extent_bytes`` is how far the elements reach from the first one.

    Compared by identity: a reader makes one for each form that it meets.
    """

    spec: TensorSpec
    strides: tuple[int, ...]
    nbytes: int
    extent_bytes: int
    space: int = layout.Space.SEGMENT

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.spec.dtype


class Descriptor(NamedTuple):
    """A checked tensor of a frame: where its first element lies, and its form."""

    offset: int
    form: Form


class Submission(NamedTuple):
    """A checked call."""

    call_id: int
    deadline_ns: int
    submitted_ns: int
    generations: tuple[int, ...]
    op_id: int
    inputs: tuple[Descriptor, ...]
    outputs: tuple[Descriptor, ...]
    metadata: bytes


_CONSTANT_END = [_HEADER_BYTES + min(count, layout.MAX_TENSORS) * DESCRIPTOR.size for count in range(2 * 256)]


def constant_part(frame: bytes) -> bytes:
    """What says, byte for byte, which op is to run on which tensors: from ``op_id`` to the last tensor. Per-call arguments lie behind it."""
    return frame[_OP_OFFSET : _CONSTANT_END[frame[_INPUT_COUNT_OFFSET] + frame[_OUTPUT_COUNT_OFFSET]]]


Taken = tuple[int, int, int, bytes, bytes]
"""A submission as it is taken: call id, deadline_ns, submitted_ns, :func:`constant_part`, and the whole frame, a private copy (F1)."""


def taken_of(frame: bytes) -> Taken:
    """The same of a frame's private copy that is no shorter than its header."""
    call_id, deadline_ns, submitted_ns = _TIMES.unpack_from(frame, 8)
    return call_id, deadline_ns, submitted_ns, constant_part(frame), frame


class SubmissionReader:
    """Checks and reads frames whose tensors must lie in ``[first_byte, end_byte)`` of a segment, or in other spaces where there are any.

    ``device_bytes``: size of the client's arena on a device, 0 without one. Which tensors are kept is the channel's to know.
    """

    __slots__ = ("_end", "_first", "_forms", "device_bytes")

    def __init__(self, first_byte: int, end_byte: int) -> None:
        self._first = first_byte
        self._end = end_byte
        self._forms: dict[bytes, Form] = {}
        self.device_bytes = 0

    def read(self, frame: bytes) -> Submission:
        """The call in ``frame``, a private copy (F1). Raises :class:`BadFrame` that says what is wrong with it."""
        if len(frame) < _HEADER_BYTES:
            raise BadFrame(f"a frame of {len(frame)} bytes is shorter than its header of {_HEADER_BYTES}")
        _, call_id, deadline_ns, submitted_ns, *rest = SUBMISSION_HEADER.unpack_from(frame)
        *generations, op_id, input_count, output_count, flags, metadata_bytes = rest
        count = input_count + output_count
        if flags:
            raise BadFrame(f"flags {flags:#x} are not known")
        if count > layout.MAX_TENSORS:
            raise BadFrame(f"{input_count} inputs and {output_count} outputs; a frame carries at most {layout.MAX_TENSORS} tensors")
        if metadata_bytes > layout.METADATA_BYTES:
            raise BadFrame(f"{metadata_bytes} bytes of metadata; a frame carries at most {layout.METADATA_BYTES}")
        needed = layout.SUBMISSION_SLOT_BYTES if metadata_bytes else _HEADER_BYTES + count * DESCRIPTOR.size
        if len(frame) < needed:
            raise BadFrame(f"a frame of {len(frame)} bytes ends before its last tensor at {needed}")
        tensors = tuple([self._descriptor(frame, _HEADER_BYTES + i * DESCRIPTOR.size, i) for i in range(count)])
        metadata = frame[_METADATA_OFFSET : _METADATA_OFFSET + metadata_bytes] if metadata_bytes else b""
        inputs, outputs = tensors[:input_count], tensors[input_count:]
        return Submission(call_id, deadline_ns, submitted_ns, tuple(generations[:count]), op_id, inputs, outputs, metadata)

    def _descriptor(self, frame: bytes, at: int, index: int) -> Descriptor:
        form = self._forms.get(frame[at + _FORM_OFFSET : at + DESCRIPTOR.size])
        offset, nbytes = _PLACE.unpack_from(frame, at)
        if form is None:
            form = self._check_form(frame, at, index)
        if nbytes != form.nbytes:
            raise BadFrame(f"tensor {index} ({form.spec}) says {nbytes} bytes; its shape makes {form.nbytes}")
        if form.space == layout.Space.KEPT:
            return Descriptor(offset, form)
        if form.space == layout.Space.DEVICE:
            if offset + form.extent_bytes > self.device_bytes:
                raise BadFrame(
                    f"tensor {index} ({form.spec}) at {offset} reaches over {form.extent_bytes} bytes, outside the device arena of "
                    f"{self.device_bytes} bytes"
                )
        elif offset < self._first or offset + form.extent_bytes > self._end:
            raise BadFrame(
                f"tensor {index} ({form.spec}) at {offset} reaches over {form.extent_bytes} bytes, outside the arena "
                f"[{self._first}, {self._end})"
            )
        if offset % form.spec.dtype.itemsize:
            raise BadFrame(f"tensor {index} ({form.spec}) at {offset} is not aligned to its elements")
        return Descriptor(offset, form)

    def _check_form(self, frame: bytes, at: int, index: int) -> Form:
        (_, _, code, ndim, space, flags, reserved, *dims) = DESCRIPTOR.unpack_from(frame, at)
        dtype = DTYPE_OF.get(code)
        if dtype is None:
            raise BadFrame(f"tensor {index} has dtype code {code}, which is not known")
        if space not in _SPACES:
            raise BadFrame(f"tensor {index} lies in space {space}, which is not known")
        if space == layout.Space.DEVICE and not self.device_bytes:
            raise BadFrame(f"tensor {index} lies in a device arena, and this client has opened none here")
        if flags or reserved:
            raise BadFrame(f"tensor {index} has flags {flags:#x} (reserved {reserved:#x}), which are not known")
        if ndim > layout.MAX_DIMS:
            raise BadFrame(f"tensor {index} has {ndim} dimensions; at most {layout.MAX_DIMS}")
        shape, strides = tuple(dims[:ndim]), tuple(dims[layout.MAX_DIMS : layout.MAX_DIMS + ndim])
        if any(dims[ndim : layout.MAX_DIMS]) or any(dims[layout.MAX_DIMS + ndim :]):
            raise BadFrame(f"tensor {index} has values in dimensions that it says it lacks")
        if any(size < 0 for size in shape) or any(stride < 0 for stride in strides):
            raise BadFrame(f"tensor {index} has a negative dimension or stride: shape {list(shape)}, strides {list(strides)}")
        if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _INT64_MAX:
            raise BadFrame(f"tensor {index} ({dtype}, {list(shape)}) has a shape whose elements cannot be counted in 63 bits")
        spec = TensorSpec(shape, dtype)
        if space == layout.Space.KEPT:
            if strides != contiguous_strides(shape):
                raise BadFrame(f"tensor {index} ({spec}) is kept by the worker, where all are contiguous, with strides {list(strides)}")
            return self._remember(frame, at, Form(spec, strides, spec.nbytes, spec.nbytes, space))
        room = self.device_bytes if space == layout.Space.DEVICE else self._end - self._first
        if spec.nbytes > room:  # strides of 0 reach nowhere, and an op would still be at it in a hundred years
            raise BadFrame(f"tensor {index} ({spec}) has {spec.nbytes} bytes of elements, more than the arena")
        extent = extent_elements(shape, strides) * dtype.itemsize
        if extent > room:
            raise BadFrame(f"tensor {index} ({spec}, strides {list(strides)}) reaches over {extent} bytes, more than the arena")
        return self._remember(frame, at, Form(spec, strides, spec.nbytes, extent, space))

    def _remember(self, frame: bytes, at: int, form: Form) -> Form:
        if len(self._forms) >= _KNOWN_FORMS:
            self._forms.clear()
        self._forms[frame[at + _FORM_OFFSET : at + DESCRIPTOR.size]] = form
        return form


CompletionFields = tuple[int, int, int, int, bytes]
"""A :class:`Completion` as it travels: a plain tuple costs a fifth of a named one."""


class Completion(NamedTuple):
    """How a call ended. ``body`` is an error's text."""

    call_id: int
    status: int
    queued_ns: int
    compute_ns: int
    body: bytes


def write_completion(slot: Slot, completion: CompletionFields) -> int:
    """Fill ``slot`` with everything but the sequence number; returns the bytes used."""
    call_id, status, queued_ns, compute_ns, body = completion
    words = slot.words
    words[CALL_ID_WORD] = call_id
    words[_STATUS_WORD] = status
    words[_TEXT_WORD] = len(body)
    words[_QUEUED_WORD] = queued_ns
    words[_COMPUTE_WORD] = compute_ns
    if body:
        slot.bytes[_BODY_OFFSET : _BODY_OFFSET + len(body)] = body
    return _BODY_OFFSET + len(body)


def read_completion(frame: bytes) -> Completion | None:
    """The completion in ``frame``, a private copy (F1); None for one that cannot be one (too short, a text beyond the room)."""
    if len(frame) < _BODY_OFFSET:
        return None
    _, call_id, status, text_bytes, queued_ns, compute_ns = COMPLETION_HEADER.unpack_from(frame)
    if text_bytes > len(frame) - _BODY_OFFSET:
        return None
    return Completion(call_id, status, queued_ns, compute_ns, frame[_BODY_OFFSET : _BODY_OFFSET + text_bytes])


def read_plain_completion(slot: Slot) -> Completion | None:
    """The completion in ``slot`` if it has no text, as most have: only its head is copied. None for any other."""
    _, call_id, status, text_bytes, queued_ns, compute_ns = COMPLETION_HEADER.unpack(bytes(slot.head))
    return None if text_bytes else Completion(call_id, status, queued_ns, compute_ns, b"")


def pack_text(text: str) -> bytes:
    """UTF-8, cut at a character so that it fits a completion."""
    return text.encode("utf-8", "replace")[: layout.TEXT_BYTES].decode("utf-8", "ignore").encode()
