"""A bound op as its client calls it: at once, as a future, or captured and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shmbroker.calls import Call, CallFuture, Plan, Result
from shmbroker.errors import BadInput
from shmbroker.memory.arena import Place
from shmbroker.memory.spec import TensorSpec, spec_of
from shmbroker.ops import Outputs
from shmbroker.statistics import OpStatistics

if TYPE_CHECKING:
    from shmbroker.channel import Channel

_KNOWN_PLANS = 1024
"""Combinations of input forms remembered; a decode that grows by a token a step starts over now and then."""

_arguments_encoder = msgspec.msgpack.Encoder()


class _Unset:
    """The type of ``timeout`` when the client's own is meant."""


_UNSET = _Unset()
Timeout = float | None | _Unset


class RemoteOp:
    """Made by :meth:`Channel.bind`. Takes torch tensors (or NumPy arrays) of any carried dtype, up to 8 dimensions, strided or not.

    A tensor that lies in the client's arena is not copied; any other is copied once. Outputs lie in the arena and are never copied; their
    blocks are free again when the last view of them dies. Keyword arguments other than ``timeout`` go to the op, in the frame (160 bytes of
    msgpack at most). Thread-safe.
    """

    __slots__ = ("_channel", "_op_id", "_outputs", "_plans", "_statistics", "name")

    def __init__(
        self, channel: Channel, name: str, op_id: int, outputs: Callable[[Sequence[TensorSpec]], Outputs], statistics: OpStatistics
    ) -> None:
        self.name = name
        self._channel = channel
        self._op_id = op_id
        self._outputs = outputs
        self._statistics = statistics
        self._plans: dict[tuple[object, ...], Plan] = {}

    def __repr__(self) -> str:
        return f"<RemoteOp {self.name!r} on {self._channel.peer_text()}>"

    def __call__(self, *inputs: torch.Tensor, timeout: Timeout = _UNSET, **arguments: Any) -> Any:
        """Call and wait: the op's output tensor, or a tuple of them.

        ``timeout``: seconds, None for no limit; the client's own by default. Raises :class:`CallTimeout`, :class:`WorkerLost`,
        :class:`RemoteOpError` with the worker's error, :class:`ArenaFull`, :class:`BadInput`.
        """
        call = self._submit(inputs, timeout, arguments)
        self._channel.wait(call)
        return call.result()

    def submit(self, *inputs: torch.Tensor, timeout: Timeout = _UNSET, **arguments: Any) -> CallFuture:
        """Call without waiting: a future, also awaitable. Its frame is with the worker when this returns."""
        return self._future(self._submit(inputs, timeout, arguments))

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> CapturedCall:
        """Place inputs and outputs and pack the frame once, to be replayed many times on the same blocks."""
        call, places = self._prepare(inputs, None, arguments)
        return CapturedCall(self, call, places)

    def _future(self, call: Call) -> CallFuture:
        future = CallFuture(call)
        call.future = future
        if call.done:  # the completion was faster than this line
            future.settle()
        return future

    def _submit(self, inputs: tuple[torch.Tensor, ...], timeout: Timeout, arguments: dict[str, Any]) -> Call:
        call, places = self._prepare(inputs, self._seconds(timeout), arguments)
        self._channel.submit(call, call.plan.template, places)
        return call

    def _seconds(self, timeout: Timeout) -> float | None:
        return self._channel.default_timeout if isinstance(timeout, _Unset) else timeout

    def _prepare(self, inputs: tuple[torch.Tensor, ...], timeout: float | None, arguments: dict[str, Any]) -> tuple[Call, list[Place]]:
        begun_ns = time.perf_counter_ns()
        channel = self._channel
        find = channel.find
        placed: list[torch.Tensor] = []
        places: list[Place] = []
        copied_bytes = copy_ns = 0
        for tensor in inputs:
            if not isinstance(tensor, torch.Tensor):
                tensor = _as_tensor(tensor)
            place = find(tensor)
            if place is None:
                copy_begun = time.perf_counter_ns()
                tensor, place = self._copy_in(tensor, timeout)
                copied_bytes += tensor.nbytes
                copy_ns += time.perf_counter_ns() - copy_begun
            placed.append(tensor)
            places.append(place)
        plan = self._plan(placed, arguments)
        outputs: list[torch.Tensor] = []
        for shape, dtype in plan.outputs:
            output, place = channel.place(shape, dtype, timeout)
            outputs.append(output)
            places.append(place)
        deadline = None if timeout is None else time.monotonic() + timeout
        call = Call(channel, self._statistics, plan, tuple(placed), tuple(outputs), begun_ns, deadline)
        call.copied_bytes = copied_bytes
        call.copy_ns = copy_ns
        call.build_ns = time.perf_counter_ns() - begun_ns - copy_ns
        return call, places

    def _copy_in(self, tensor: torch.Tensor, timeout: float | None) -> tuple[torch.Tensor, Place]:
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise BadInput(f"op {self.name!r}: a {tensor.layout} tensor on {tensor.device} has no bytes to hand over")
        inside, place = self._channel.place(tuple(tensor.shape), tensor.dtype, timeout)
        inside.copy_(tensor.detach())
        return inside, place

    def _plan(self, inputs: list[torch.Tensor], arguments: dict[str, Any]) -> Plan:
        packed = _arguments_encoder.encode(arguments) if arguments else b""
        key = (packed, *[(tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs])
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan(self._op_id, inputs, self._outputs([spec_of(tensor) for tensor in inputs]), packed)
            if len(self._plans) >= _KNOWN_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def resubmit(self, like: Call, places: list[Place], timeout: Timeout) -> Call:
        """For :class:`CapturedCall`: another call with the same tensors, plan and places."""
        seconds = self._seconds(timeout)
        begun_ns = time.perf_counter_ns()
        deadline = None if seconds is None else time.monotonic() + seconds
        call = Call(self._channel, self._statistics, like.plan, like.inputs, like.outputs, begun_ns, deadline)
        self._channel.submit(call, like.plan.template, places)
        return call

    def wait(self, call: Call) -> Result:
        """For :class:`CapturedCall`: the result of a call that was submitted."""
        self._channel.wait(call)
        return call.result()


class CapturedCall:
    """Made by :meth:`RemoteOp.capture`: blocks placed, frame packed. Write into ``inputs`` in place, then :meth:`replay`.

    ``inputs`` and ``outputs`` are tuples of tensors in the arena; every replay reads and overwrites the same ones.
    """

    __slots__ = ("_call", "_op", "_places", "inputs", "outputs")

    def __init__(self, op: RemoteOp, call: Call, places: list[Place]) -> None:
        self._op = op
        self._call = call
        self._places = places
        self.inputs = call.inputs
        self.outputs = call.outputs

    def replay(self, *, timeout: Timeout = _UNSET) -> Any:
        """Call again and wait: the output tensor, or a tuple of them. Raises as :meth:`RemoteOp.__call__`."""
        return self._op.wait(self._op.resubmit(self._call, self._places, timeout))

    def submit(self, *, timeout: Timeout = _UNSET) -> CallFuture:
        """Call again without waiting. The same blocks are used by every replay: wait for one before the next."""
        return self._op._future(self._op.resubmit(self._call, self._places, timeout))


def _as_tensor(value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"a {type(value).__name__} cannot be handed over as a tensor: {error}") from None
