"""A channel as its worker sees it: the client's memory as tensors, the ops bound on it, and how one frame is run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from shmbroker.control.liveness import Watch
from shmbroker.control.messages import OpenChannel
from shmbroker.errors import BadFrame, BadInput
from shmbroker.lane.frames import Completion, Descriptor, Form, Submission, SubmissionReader, pack_text
from shmbroker.memory.layout import Status
from shmbroker.memory.segment import Segment
from shmbroker.memory.spec import TensorSpec
from shmbroker.ops import BoundOp

_KNOWN_SIGNATURES = 4096
"""Combinations of forms remembered as checked; beyond that the record starts over."""

_arguments_decoder = msgspec.msgpack.Decoder(dict[str, object])
_call_id_word = slice(8, 16)


class MappedSegment:
    """A client's segment as a worker maps it: one flat tensor for each dtype, of which every tensor of a frame is a view."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        geometry = segment.geometry
        self.reader = SubmissionReader(geometry.arena_offset, geometry.total_bytes)
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self.users = 0

    def view(self, descriptor: Descriptor) -> torch.Tensor:
        """The tensor that a checked descriptor names, in place."""
        form = descriptor.form
        dtype = form.spec.dtype
        flat = self._flat.get(dtype)
        if flat is None:
            flat = self._flat[dtype] = torch.frombuffer(self.segment.map, dtype=dtype)
        return torch.as_strided(flat, form.spec.shape, form.strides, descriptor.offset // dtype.itemsize)

    def close(self) -> None:
        """Unmap, once no tensor of it lives."""
        self._flat.clear()
        self.segment.close()


@dataclass(slots=True)
class ChannelCounters:
    """What a channel has done."""

    calls: int = 0
    errors: int = 0
    compute_ns: int = 0


@dataclass(slots=True)
class WorkerChannel:
    """One open channel."""

    number: int
    opened: OpenChannel
    mapped: MappedSegment
    watch: Watch
    token: bytes = b""
    ops: dict[int, BoundOp] = field(default_factory=dict)
    counters: ChannelCounters = field(default_factory=ChannelCounters)
    _op_ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _checked: set[tuple[object, ...]] = field(default_factory=set)

    def bind(self, op: BoundOp) -> int:
        """Give ``op`` a number on this channel."""
        op_id = next(self._op_ids)
        self.ops[op_id] = op
        return op_id

    def run(self, frame: bytes, draining: bool) -> Completion:
        """Run the call in ``frame``, a private copy. Every outcome, also of a frame that makes no sense, is a completion."""
        taken_ns = time.monotonic_ns()
        counters = self.counters
        counters.calls += 1
        try:
            call = self.mapped.reader.read(frame)
        except BadFrame as error:
            counters.errors += 1
            call_id = int.from_bytes(frame[_call_id_word], "little")
            return Completion(call_id, Status.BAD_FRAME, 0, 0, 0, pack_text(str(error)))
        queued_ns = max(0, taken_ns - call.submitted_ns)
        if draining:
            return Completion(call.call_id, Status.DRAINING, 0, queued_ns, 0, b"")
        if call.deadline_ns and taken_ns > call.deadline_ns:
            counters.errors += 1
            return Completion(call.call_id, Status.EXPIRED, 0, queued_ns, 0, b"")
        status, text, compute_ns = self._run_op(call)
        counters.compute_ns += compute_ns
        if status is not Status.OK:
            counters.errors += 1
        return Completion(call.call_id, status, 0, queued_ns, compute_ns, text)

    def _run_op(self, call: Submission) -> tuple[Status, bytes, int]:
        try:
            op = self.ops.get(call.op_id)
            if op is None:
                raise BadFrame(f"op id {call.op_id} is not bound on this channel")
            self._check(op, call.op_id, call.inputs, call.outputs)
            view = self.mapped.view
            inputs = [view(descriptor) for descriptor in call.inputs]
            outputs = [view(descriptor) for descriptor in call.outputs]
            arguments = _arguments_decoder.decode(call.metadata) if call.metadata else {}
        except (BadFrame, msgspec.DecodeError) as error:
            return Status.BAD_FRAME, pack_text(str(error)), 0
        except Exception as error:  # an out_spec that fails on odd shapes is the frame's fault too
            return Status.BAD_FRAME, pack_text(f"{type(error).__name__}: {error}"), 0
        begun = time.perf_counter_ns()
        try:
            op.run(inputs, outputs, arguments)
        except Exception as error:  # whatever the op raises is the answer to the call; the worker lives on
            text = f"{type(error).__name__}\n{error}"
            return Status.OP_ERROR, pack_text(text), time.perf_counter_ns() - begun
        return Status.OK, b"", time.perf_counter_ns() - begun

    def _check(self, op: BoundOp, op_id: int, inputs: Sequence[Descriptor], outputs: Sequence[Descriptor]) -> None:
        """Compare the outputs' room with what the op writes, once for each combination of forms."""
        key: tuple[int | Form, ...] = (op_id, len(inputs), *[d.form for d in inputs], *[d.form for d in outputs])
        if key in self._checked:
            return
        try:
            expected = op.outputs([d.form.spec for d in inputs]).specs
        except BadInput as error:
            raise BadFrame(str(error)) from None
        given = tuple(d.form.spec for d in outputs)
        if given != expected:
            raise BadFrame(f"op {op.name!r} writes {_listed(expected)}, the frame has room for {_listed(given)}")
        if len(self._checked) >= _KNOWN_SIGNATURES:
            self._checked.clear()
        self._checked.add(key)


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(str(spec) for spec in specs) or "nothing"
