"""How a worker checks a submission that it cannot trust."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shmbroker.arena.spec import DTYPE_OF, TensorSpec, contiguous_strides, extent_elements
from shmbroker.errors import BadFrame
from shmbroker.lane.frame_layout import DESCRIPTOR, FORM_OFFSET, HEADER_BYTES, METADATA_OFFSET, OFFSET_AND_NBYTES, SUBMISSION_HEADER
from shmbroker.memory import layout

KNOWN_FORMS = 4096
"""Forms remembered; a process whose peer sends ever new ones starts over rather than growing."""

_INT64_MAX = (1 << 63) - 1
_SPACES = frozenset(layout.Space)


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
        if len(frame) < HEADER_BYTES:
            raise BadFrame(f"a frame of {len(frame)} bytes is shorter than its header of {HEADER_BYTES}")
        _, call_id, deadline_ns, submitted_ns, *rest = SUBMISSION_HEADER.unpack_from(frame)
        *generations, op_id, input_count, output_count, flags, metadata_bytes = rest
        count = input_count + output_count
        if flags:
            raise BadFrame(f"flags {flags:#x} are not known")
        if count > layout.MAX_TENSORS:
            raise BadFrame(f"{input_count} inputs and {output_count} outputs; a frame carries at most {layout.MAX_TENSORS} tensors")
        if metadata_bytes > layout.METADATA_BYTES:
            raise BadFrame(f"{metadata_bytes} bytes of metadata; a frame carries at most {layout.METADATA_BYTES}")
        needed = layout.SUBMISSION_SLOT_BYTES if metadata_bytes else HEADER_BYTES + count * DESCRIPTOR.size
        if len(frame) < needed:
            raise BadFrame(f"a frame of {len(frame)} bytes ends before its last tensor at {needed}")
        tensors = tuple([self._descriptor(frame, HEADER_BYTES + i * DESCRIPTOR.size, i) for i in range(count)])
        metadata = frame[METADATA_OFFSET : METADATA_OFFSET + metadata_bytes] if metadata_bytes else b""
        inputs, outputs = tensors[:input_count], tensors[input_count:]
        return Submission(call_id, deadline_ns, submitted_ns, tuple(generations[:count]), op_id, inputs, outputs, metadata)

    def _descriptor(self, frame: bytes, at: int, index: int) -> Descriptor:
        form = self._forms.get(frame[at + FORM_OFFSET : at + DESCRIPTOR.size])
        offset, nbytes = OFFSET_AND_NBYTES.unpack_from(frame, at)
        if form is None:
            form = self._check_form(frame, at, index)
        if nbytes != form.nbytes:
            raise BadFrame(f"tensor {index} ({form.spec}) says {nbytes} bytes; its shape makes {form.nbytes}")
        self.check_place(index, offset, form)
        return Descriptor(offset, form)

    def check_place(self, index: int, offset: int, form: Form) -> None:
        """Raise :class:`BadFrame` unless tensor ``index`` of a frame, of a form that was checked, may lie at ``offset``."""
        if form.space == layout.Space.KEPT:
            return
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
        if len(self._forms) >= KNOWN_FORMS:
            self._forms.clear()
        self._forms[frame[at + FORM_OFFSET : at + DESCRIPTOR.size]] = form
        return form
