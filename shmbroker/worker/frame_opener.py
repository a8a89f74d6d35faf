"""From a frame that was not met before to a call that need only be run.

Most such frames differ from earlier ones in nothing but where their tensors lie, as those of each token of a decode do. What they have in common (op,
forms, whether it writes one tensor) is checked once, and remembered: of the next one only its tensors' places are checked.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from shmbroker.arena.spec import TensorSpec
from shmbroker.errors import BadFrame, describe
from shmbroker.lane.frame_layout import DESCRIPTOR, HEADER_BYTES, KEPT_OP, OP_OFFSET
from shmbroker.lane.submission_reader import Descriptor, Form, Submission
from shmbroker.memory.layout import Space
from shmbroker.worker.kept_calls import about_kept, with_kept
from shmbroker.worker.kept_tensors import KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import BoundOp, Static
from shmbroker.worker.prepared_call import PreparedCall

TRIED_BYTES = 64 << 20
"""An op's first call of a kind runs on copies of its inputs, unless they are larger: an op that writes into one, or keeps one, then does no harm."""

KNOWN_KINDS = 1024
"""Kinds of frames remembered, for each channel; beyond that the record starts over."""

_arguments_decoder = msgspec.msgpack.Decoder(dict[str, object])
_NO_ARGUMENTS: Static = {}
_HEAD_BYTES = HEADER_BYTES - OP_OFFSET
"""Of a frame's constant part, before its first descriptor."""
_OFFSET = struct.Struct("<Q")
"""How a descriptor begins."""


class Rejected(Exception):
    """A frame that is not run. No error that an op can raise: whatever an op raises is the op's error."""


class _Kind(NamedTuple):
    """What was checked of a frame without per-call arguments, all of whose tensors lie in the segment: all but where."""

    op: BoundOp
    inputs: tuple[Form, ...]
    outputs: tuple[Form, ...]
    single: bool


@dataclass(slots=True)
class FrameOpener:
    """Opens the frames of one channel. Used by whoever has the turn."""

    mapped: MappedSegment
    ops: Mapping[int, BoundOp]
    """By number, as bound on the channel. A number is never given to another op."""
    kept: KeptTensors
    _kinds: dict[bytes, _Kind] = field(default_factory=dict)
    """By :func:`_but_places` of their frames."""

    def open(self, frame: bytes, constant: bytes, ahead: bool = False) -> PreparedCall:
        """Check a frame whose constant part is ``constant``. Raises :class:`Rejected`, and what the op's out_spec raises.

        ``ahead``: not if it is to be tried out.
        """
        key = _but_places(constant)
        kind = self._kinds.get(key)
        if kind is not None:
            return self._at(kind, constant)
        try:
            call = self.mapped.reader.read(frame)
            if call.op_id == KEPT_OP:
                return about_kept(self.kept, self.mapped, call)
            op = self.ops.get(call.op_id)
            if op is None:
                raise Rejected(f"op id {call.op_id} is not bound on this channel")
            arguments = _arguments_decoder.decode(call.metadata) if call.metadata else {}
        except (BadFrame, msgspec.DecodeError, ValueError) as error:
            raise Rejected(str(error) if isinstance(error, BadFrame) else describe(error)) from None
        single, foretold = _check(op, call, arguments)
        forms = [place.form for place in (*call.inputs, *call.outputs)]
        try:
            if any(form.space == Space.KEPT for form in forms):
                return with_kept(self.kept, self.mapped, call, op, arguments, single=single)
            inputs, outputs = self.mapped.views(call.inputs), self.mapped.views(call.outputs)
        except BadFrame as error:
            raise Rejected(str(error)) from None
        kind_of_inputs = tuple([(place.form.dtype, len(place.form.spec.shape)) for place in call.inputs])
        divisible = not self.mapped.memory.asynchronous
        proven = op.is_proven(kind_of_inputs)
        if ahead and not proven:
            raise Rejected("its kind is to be tried out first")
        if not proven and sum([tensor.nbytes for tensor in inputs]) <= TRIED_BYTES and divisible:
            copies = [tensor.clone() for tensor in inputs]
            unwritten = [tensor.clone() for tensor in copies]  # what the caller does with its tensors meanwhile is not the op's doing
            return PreparedCall(
                op,
                copies,
                outputs,
                arguments,
                single=single,
                repeatable=False,
                unwritten=unwritten,
                tried_as=kind_of_inputs,
                divisible=divisible,
            )
        if proven and foretold and not call.metadata and all(form.space == Space.SEGMENT for form in forms):
            if len(self._kinds) >= KNOWN_KINDS:
                self._kinds.clear()
            self._kinds[key] = _Kind(op, tuple(forms[: len(call.inputs)]), tuple(forms[len(call.inputs) :]), single)
        return PreparedCall(op, inputs, outputs, arguments, single=single, repeatable=not call.metadata, divisible=divisible)

    def _at(self, kind: _Kind, constant: bytes) -> PreparedCall:
        """A call of a known kind, where its frame says."""
        places: list[Descriptor] = []
        check = self.mapped.reader.check_place
        try:
            for index, form in enumerate((*kind.inputs, *kind.outputs)):
                (offset,) = _OFFSET.unpack_from(constant, _HEAD_BYTES + index * DESCRIPTOR.size)
                check(index, offset, form)
                places.append(Descriptor(offset, form))
        except BadFrame as error:
            raise Rejected(str(error)) from None
        tensors, count = self.mapped.views(places), len(kind.inputs)
        return PreparedCall(
            kind.op,
            tensors[:count],
            tensors[count:],
            _NO_ARGUMENTS,
            single=kind.single,
            repeatable=True,
            divisible=not self.mapped.memory.asynchronous,
        )

    def forget(self) -> None:
        """Let go of what is remembered."""
        self._kinds.clear()


def _but_places(constant: bytes) -> bytes:
    """A frame's constant part less its tensors' offsets."""
    size = DESCRIPTOR.size
    starts = range(_HEAD_BYTES, len(constant), size)
    return constant[:_HEAD_BYTES] + b"".join([constant[start + _OFFSET.size : start + size] for start in starts])


def _check(op: BoundOp, call: Submission, arguments: Static) -> tuple[bool, bool]:
    """Compare the outputs' room with what the op writes; returns whether that is one tensor rather than a sequence, and whether it is known.

    An op that returns its results is compared with the room when it has, and not tried out for that: its client may know the shapes.
    """
    given = tuple(descriptor.form.spec for descriptor in call.outputs)
    expected = op.known_outputs([descriptor.form.spec for descriptor in call.inputs], arguments)
    if expected is None:
        return len(given) == 1, False
    if given != expected.specs:
        raise Rejected(f"op {op.name!r} writes {_listed(expected.specs)}, the frame has room for {_listed(given)}")
    return expected.single, True


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(str(spec) for spec in specs) or "nothing"
