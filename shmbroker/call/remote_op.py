"""A bound op as its client calls it: at once, as a future, or captured and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import torch

from shmbroker.arena.room import room_for
from shmbroker.arena.spec import TensorSpec, spec_of
from shmbroker.call.call import Call, Places, ReplayedCall, Result, clock_ns
from shmbroker.call.captured_call import CapturedCall
from shmbroker.call.client_memory import as_tensor
from shmbroker.call.future import CallFuture
from shmbroker.call.kept import Kept
from shmbroker.call.placement import Placement
from shmbroker.call.plain_tensors import levels, refuse_gradient, refuse_tangents, refuse_wrapped
from shmbroker.call.plan import Plan
from shmbroker.call.queue_pair import QueuePair
from shmbroker.call.state import DONE
from shmbroker.call.statistics import OpStatistics
from shmbroker.call.timeout import UNSET, Timeout, nanoseconds_of
from shmbroker.call.write_back import back_to
from shmbroker.errors import BadInput
from shmbroker.lane.outputs import Outputs
from shmbroker.memory.layout import Space

_KNOWN_PLANS = 1024
"""Combinations of input forms remembered; a decode that grows by a token a step starts over now and then."""

ASKING_NS = 1_000_000
"""Planning that took longer than this has asked the worker, and is taken off the call's timeout: nothing else of it takes as long."""

OutputsOf = Callable[[Sequence[TensorSpec], dict[str, Any], float | None], Outputs]
"""The outputs for such inputs and per-call arguments, told within so many seconds; None for no limit."""


class FastPath(Protocol):
    """Learns which calls are ordinary, for a :class:`RemoteOp` that makes them without Python."""

    @property
    def made(self) -> int:
        """Calls and replays that were made so."""

    def learn(self, plan: Plan, inputs: tuple[torch.Tensor, ...]) -> None:
        """Tensors of such forms are called by ``plan``."""


_arguments_encoder = msgspec.msgpack.Encoder()


class RemoteOp:
    """Made by :meth:`Channel.bind`. Takes torch tensors (or NumPy arrays) of any carried dtype, up to 8 dimensions, strided or not.

    A tensor that lies in the client's arena is not copied; any other is copied once. Outputs lie in the arena and are never copied; their
    blocks are free again when the last view of them dies. What an op that works in place writes into an input is there when the call is done, wherever
    the tensor lies; a captured one's stays in its ``inputs``. Keyword arguments other than ``timeout`` go to the op, in the frame (128 bytes of
    msgpack at most). Thread-safe.
    """

    __slots__ = (
        "_arena",
        "_default_timeout",
        "_outputs",
        "_pair",
        "_placement",
        "_plans",
        "_statistics",
        "_timeout",
        "fast",
        "in_place",
        "name",
        "op_id",
    )

    def __init__(
        self,
        pair: QueuePair,
        placement: Placement,
        default_timeout: float | None,
        name: str,
        op_id: int,
        outputs: OutputsOf,
        statistics: OpStatistics,
        in_place: bool = False,
    ) -> None:
        """``default_timeout``: seconds that a call may take which gives none of its own; None for no limit. ``in_place``: the op writes into inputs."""
        self.name = name
        self._pair = pair
        self._placement = placement
        self._arena = placement.arena
        self._default_timeout = default_timeout
        self.op_id = op_id
        """Its number on the channel."""
        self._outputs = outputs
        self._statistics = statistics
        self.in_place = in_place
        """Whether the op writes into its inputs."""
        self._plans: dict[object, Plan] = {}
        self._timeout: tuple[float | None, int] = None, 0
        """The last one with its nanoseconds: it is the same object in call after call."""
        self.fast: FastPath | None = None
        """What knows the kinds of calls that are made without Python, where they are."""

    def __repr__(self) -> str:
        counted = self._statistics
        return f"<RemoteOp {self.name!r} on {self._pair.peer_text()}: {counted.calls} calls, {counted.errors} failed>"

    def __call__(self, *inputs: torch.Tensor, timeout: Timeout = UNSET, **arguments: Any) -> Any:
        """Call and wait: the op's output tensor, or a tuple of them.

        ``timeout``: seconds, None for no limit; the client's own by default. Raises :class:`CallTimeout`, :class:`WorkerLost`,
        :class:`RemoteOpError` with the worker's error, :class:`ArenaFull`, :class:`BadInput`.
        """
        seconds = self._default_timeout if timeout is UNSET else timeout
        call, offsets, generations = self._prepare(inputs, seconds, arguments)
        pair = self._pair
        pair.submit(call, call.plan.template, offsets, generations)
        if not pair.completions.wait(call, call.deadline_ns):
            pair.expire(call)
        return call.result()

    def submit(self, *inputs: torch.Tensor, timeout: Timeout = UNSET, **arguments: Any) -> CallFuture:
        """Call without waiting: a future, also awaitable. Its frame is with the worker when this returns."""
        seconds = self._default_timeout if timeout is UNSET else timeout
        call, offsets, generations = self._prepare(inputs, seconds, arguments)
        self._pair.submit(call, call.plan.template, offsets, generations)
        return self.future_of(call)

    def keep(self, *inputs: torch.Tensor | Kept, timeout: Timeout = UNSET, **arguments: Any) -> Any:
        """Call and wait, with the results staying on the worker: a :class:`Kept`, or a tuple of them, to be inputs of later calls on this channel.

        Raises as :meth:`__call__`; the worker bounds how much it keeps.
        """
        seconds = self._default_timeout if timeout is UNSET else timeout
        call, offsets, generations = self._prepare(inputs, seconds, arguments, Space.KEPT)
        self._pair.submit(call, call.plan.template, offsets, generations)
        return self.wait(call)

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> CapturedCall:
        """Place inputs and outputs and pack the frame once, to be replayed many times on the same blocks."""
        call, offsets, generations = self._prepare(inputs, None, arguments)
        return self._captured(call, offsets, generations)

    def _captured(self, call: Call, offsets: list[int], generations: list[int]) -> CapturedCall:
        return CapturedCall(self, call, offsets, generations)

    @staticmethod
    def future_of(call: Call) -> CallFuture:
        """A future for a call that was submitted."""
        future = CallFuture(call)
        call.future = future
        if call.state is DONE:  # the completion was faster than this line
            future.settle()
        return future

    def _prepare(
        self, inputs: tuple[Any, ...], timeout: float | None, arguments: dict[str, Any], output_space: int = Space.SEGMENT
    ) -> tuple[Call, list[int], list[int]]:
        """Place whatever has no place yet. The hot path: its steps and their cost are in docs/performance.md.

        From the moment that a block is found, its hold is the call's: whatever becomes of the tensor, the block stays the call's.
        """
        begun_ns = clock_ns()
        if levels._current_level >= 0:
            refuse_tangents(f"op {self.name!r}: input", inputs)
        limit_ns = self._limit_ns(timeout)
        arena = self._arena
        blocks, address = arena.blocks, arena.address
        offsets: list[int] = []
        generations: list[int] = []
        holds: list[object] = []
        copied: list[int] = []
        spaces: list[int] = []
        placed: list[torch.Tensor] | tuple[torch.Tensor, ...] = inputs
        for index, tensor in enumerate(inputs):
            try:
                offset = tensor.data_ptr() - address
            except (AttributeError, RuntimeError):
                offset = -1  # no tensor, or one without a place in memory
            block = blocks.get(offset)
            if block is not None and not tensor.requires_grad and not tensor.is_neg():
                holds.append(block.hold)
                generations.append(block.generation)
            else:
                if isinstance(placed, tuple):
                    placed = list(inputs)
                placed[index], offset, generation, space = self._bring_in(index, tensor, timeout, copied, holds)
                generations.append(generation)
                if space:
                    spaces = spaces or [Space.SEGMENT] * len(inputs)
                    spaces[index] = space
            offsets.append(offset)
        plan = self._plans.get(_signature(placed)) if not (arguments or spaces or output_space) else None
        if plan is None:
            placed = self._as_shown(placed, timeout, offsets, generations, copied, holds)
            planning_ns = clock_ns()
            plan = self._plan(placed, arguments, timeout, spaces, output_space)
            planned_ns = clock_ns() - planning_ns
            begun_ns += planned_ns  # done once for such inputs: no part of the call
            if timeout is not None and planned_ns > ASKING_NS:
                timeout = max(1e-9, timeout - planned_ns / 1e9)  # but of what its caller waits for
                limit_ns = max(1, limit_ns - planned_ns)
        self._pair.nudge()
        outputs: list[Any] = []
        if plan.output_space:
            self._placement.place_elsewhere(plan, timeout, outputs, offsets, generations, holds)
        for room in plan.rooms if not plan.output_space else ():
            output, block = arena.place_now(room) or self._placement.place(room, timeout)
            outputs.append(output)
            offsets.append(block.offset)
            generations.append(block.generation)
            holds.append(block.hold)
        call = Call(plan, placed, outputs, begun_ns, limit_ns and begun_ns + limit_ns, holds)
        if copied:
            call.copied_bytes, call.copy_ns = sum(copied[::2]), sum(copied[1::2])
            call.back = back_to(self.name, inputs, placed) if self.in_place else ()
        if plan.before is not None:
            plan.before()
        return call, offsets, generations

    def _as_shown(
        self,
        placed: list[torch.Tensor] | tuple[torch.Tensor, ...],
        timeout: float | None,
        offsets: list[int],
        generations: list[int],
        copied: list[int],
        holds: list[object],
    ) -> list[torch.Tensor] | tuple[torch.Tensor, ...]:
        """Complex tensors that torch shows as conjugates of what lies in their blocks are copied, as the others go as they are."""
        for index, tensor in enumerate(placed):
            if isinstance(tensor, torch.Tensor) and tensor.is_complex() and tensor.is_conj():
                placed = list(placed)
                placed[index], offsets[index], generations[index], _ = self._bring_in(index, tensor, timeout, copied, holds)
        return placed

    def _bring_in(
        self, index: int, tensor: Any, timeout: float | None, copied: list[int], holds: list[object]
    ) -> tuple[Any, int, int, int]:
        """Input ``index``, which does not simply begin where a block does, as it goes into the frame, with offset, generation and space.

        A view inside a block goes as it is, and so does what lies in another space; any other as a copy, noted in ``copied``. The hold of its
        block is added to ``holds``.
        """
        if isinstance(tensor, Kept):
            return tensor, tensor.number_in(self._placement.kept), 1, Space.KEPT
        if not isinstance(tensor, torch.Tensor):
            tensor = as_tensor(tensor)
        what = f"op {self.name!r}: input {index}"
        refuse_gradient(what, tensor)
        location, space = self._arena.find(tensor), Space.SEGMENT
        if location is None:
            location, space = self._placement.find_on_device(tensor), Space.DEVICE
        if location is not None:
            holds.append(location.block.hold)
            return tensor, location.offset, location.generation, space
        refuse_wrapped(what, tensor)
        begun_ns = clock_ns()
        inside, block = self._placement.place(room_for(tensor.shape, tensor.dtype), timeout)
        holds.append(block.hold)
        inside.copy_(tensor.detach() if tensor.requires_grad else tensor)
        copied += (tensor.nbytes, clock_ns() - begun_ns)
        return inside, block.offset, block.generation, Space.SEGMENT

    def _plan(
        self, inputs: Sequence[torch.Tensor], arguments: dict[str, Any], timeout: float | None, spaces: Sequence[int], output_space: int
    ) -> Plan:
        packed = b""
        if arguments:
            try:
                packed = _arguments_encoder.encode(arguments)
            except (TypeError, OverflowError) as error:
                raise BadInput(
                    f"op {self.name!r}: a call's own arguments are numbers, strings, booleans, None and lists of these; {error}"
                ) from None
        before = None
        if Space.DEVICE in spaces:
            before = self._placement.memory.device_written
            output_space = output_space or Space.DEVICE  # results lie where inputs do
        key: object = (packed, _signature(inputs)) if packed else _signature(inputs)
        if any(tensor.dtype.is_complex for tensor in inputs):
            key = (key, "looked at")  # not found without being looked at first, by _as_shown
        if spaces or output_space:
            key = (key, tuple(spaces), output_space)
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan(
                self._pair,
                self._statistics,
                self.op_id,
                inputs,
                self._outputs(
                    [spec_of(tensor) for tensor in inputs], arguments, None if timeout is None else nanoseconds_of(timeout) / 1e9
                ),
                packed,
                spaces,
                output_space,
                before,
            )
            if len(self._plans) >= _KNOWN_PLANS:
                self._plans.clear()
            self._plans[key] = plan
            if self.fast is not None and not (packed or spaces or output_space):
                self.fast.learn(plan, tuple(inputs))
        return plan

    def resubmit(self, like: Call, offsets: list[int], generations: list[int], timeout: Timeout, written: Places | None = None) -> Call:
        """For :class:`CapturedCall`: another call with the same tensors, plan and places. ``written``: the outputs, for a call that looks after them itself."""
        seconds = self._default_timeout if timeout is UNSET else timeout
        begun_ns = clock_ns()
        limit_ns = self._limit_ns(seconds)
        deadline_ns = limit_ns and begun_ns + limit_ns
        if written is None:
            call = Call(like.plan, like.inputs, like.outputs, begun_ns, deadline_ns, like.holds)
        else:
            call = ReplayedCall(like, begun_ns, deadline_ns, written)
        if like.plan.before is not None:
            like.plan.before()
        self._pair.submit(call, like.plan.template, offsets, generations)
        return call

    def wait(self, call: Call) -> Result:
        """For :class:`CapturedCall`: the result of a call that was submitted."""
        pair = self._pair
        if not pair.completions.wait(call, call.deadline_ns):
            pair.expire(call)
        return call.result()

    def _limit_ns(self, timeout: float | None) -> int:
        """Nanoseconds that a call may take; 0 for no limit. Raises :class:`BadInput`."""
        if timeout is None:
            return 0
        known, nanoseconds = self._timeout
        if timeout is not known:
            nanoseconds = nanoseconds_of(timeout)
            self._timeout = timeout, nanoseconds
        return nanoseconds


def _signature(tensors: Sequence[torch.Tensor]) -> object:
    """What decides which plan holds: shapes, dtypes and strides."""
    if len(tensors) == 1:
        tensor = tensors[0]
        return tensor.shape, tensor.dtype, tensor.stride()
    return tuple([(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors])
