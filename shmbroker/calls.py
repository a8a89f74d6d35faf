"""Calls on their way: what is kept of one while it is outstanding, and the future that stands for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from shmbroker.completions import release_waiter
from shmbroker.errors import BadFrame, CallError, CallTimeout, RemoteOpError, ShmBrokerError, WorkerDraining
from shmbroker.lane.frames import Completion, CompletionFields, FrameTemplate
from shmbroker.memory.layout import Space, Status
from shmbroker.memory.room import Room
from shmbroker.memory.spec import contiguous_strides, spec_of
from shmbroker.ops import Outputs

if TYPE_CHECKING:
    from shmbroker.channel import Channel
    from shmbroker.statistics import OpStatistics

Result = torch.Tensor | tuple[torch.Tensor, ...]

clock_ns = time.monotonic_ns
"""The one clock of a call: deadlines in frames are told by it too."""


class Plan:
    """All that is the same for every call with inputs of the same shapes, dtypes and strides."""

    __slots__ = (
        "before",
        "buckets",
        "bytes_in",
        "bytes_out",
        "channel",
        "output_space",
        "rooms",
        "single",
        "specs",
        "statistics",
        "template",
    )

    def __init__(
        self,
        channel: Channel,
        statistics: OpStatistics,
        op_id: int,
        inputs: Sequence[torch.Tensor],
        outputs: Outputs,
        arguments: bytes,
        spaces: Sequence[int] = (),
        output_space: int = Space.SEGMENT,
        before: Callable[[], None] | None = None,
    ) -> None:
        """``spaces`` of the inputs, where not all lie in the segment; ``before``: what to do before such a call is published."""
        self.channel = channel
        self.statistics = statistics
        self.buckets = channel.buckets
        self.template = FrameTemplate(
            op_id,
            [(spec_of(tensor), tensor.stride()) for tensor in inputs],
            [(spec, contiguous_strides(spec.shape)) for spec in outputs.specs],
            arguments,
            (*(spaces or (Space.SEGMENT,) * len(inputs)), *(output_space,) * len(outputs.specs)) if spaces or output_space else (),
        )
        self.specs = outputs.specs
        self.rooms = tuple(Room(spec.shape, spec.dtype) for spec in outputs.specs)
        self.single = outputs.single
        self.output_space = output_space
        self.before = before
        handed = [
            tensor for index, tensor in enumerate(inputs) if not spaces or spaces[index] != Space.KEPT
        ]  # what is kept stays where it is
        self.bytes_out = sum(tensor.nbytes for tensor in handed)
        self.bytes_in = 0 if output_space == Space.KEPT else sum(spec.nbytes for spec in outputs.specs)


class Call:
    """One call from submission to completion. It holds inputs and outputs, so their blocks cannot be placed anew meanwhile."""

    __slots__ = (
        "begun_ns",
        "call_id",
        "copied_bytes",
        "copy_ns",
        "deadline_ns",
        "done",
        "error",
        "future",
        "inputs",
        "outputs",
        "plan",
        "submitted_ns",
        "wake",
    )

    call_id: int
    copy_ns: int
    submitted_ns: int
    wake: threading.Lock | None
    error: ShmBrokerError | None
    future: CallFuture | None

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        begun_ns: int,
        deadline_ns: int,
    ) -> None:
        """Times in nanoseconds of CLOCK_MONOTONIC; ``deadline_ns`` 0 for none."""
        self.plan = plan
        self.inputs = inputs
        self.outputs = outputs
        self.begun_ns = begun_ns
        self.deadline_ns = deadline_ns
        self.call_id = 0
        self.done = False
        self.copied_bytes = 0
        self.error = self.wake = self.future = None

    @property
    def channel(self) -> Channel:
        """The channel it goes over."""
        return self.plan.channel

    @property
    def statistics(self) -> OpStatistics:
        """Where it is counted."""
        return self.plan.statistics

    def finish(self, completion: CompletionFields, taken_ns: int) -> None:
        """The worker has answered."""
        _, status, queued_ns, compute_ns, _ = completion
        plan = self.plan
        statistics = plan.statistics
        if status and self.error is None:  # a call that has timed out is counted already
            self.error = self._error_of(Completion(*completion))
            statistics.errors += 1
        begun_ns = self.begun_ns
        now = clock_ns()
        rpc_ns = now - begun_ns
        statistics.calls += 1
        statistics.rpc_ns += rpc_ns
        statistics.samples.append(rpc_ns)
        plan.buckets[(rpc_ns * rpc_ns).bit_length()] += 1
        # A worker's figures are its own claim: never more than the call took.
        statistics.compute_ns += compute_ns if compute_ns < rpc_ns else rpc_ns
        statistics.queued_ns += queued_ns if queued_ns < rpc_ns else rpc_ns
        statistics.build_ns += self.submitted_ns - begun_ns
        statistics.read_ns += now - taken_ns
        statistics.bytes_out += plan.bytes_out
        statistics.bytes_in += plan.bytes_in
        if self.copied_bytes:
            statistics.copied_bytes += self.copied_bytes
            statistics.copy_ns += self.copy_ns
            statistics.build_ns -= self.copy_ns
        self.inputs = ()  # the worker is done with them: nobody need hold their blocks for this call
        self.done = True
        if statistics.on_finish is not None:
            statistics.on_finish(self, queued_ns, compute_ns, taken_ns, now)
        if self.wake is not None or self.future is not None:
            self._tell()

    def expire(self) -> None:
        """The deadline has passed. The call stays outstanding, and so holds its blocks, until the worker answers it or dies."""
        if not self.done and self.error is None:
            self.statistics.errors += 1
            self.error = self.timeout_error()
            if self.future is not None:
                self.future.settle()

    def fail(self, error: ShmBrokerError) -> None:
        """The call will never be answered."""
        if self.error is None:
            self.error = error
            self.statistics.errors += 1
        self.inputs = ()
        self.done = True
        self._tell()

    def _tell(self) -> None:
        wake = self.wake
        if wake is not None:
            release_waiter(wake)
        if self.future is not None:
            self.plan.channel.completions.settle_later(self.future)

    def result(self) -> Result:
        """The outputs of a call that is done, or its error raised."""
        if self.error is not None:
            raise self.error
        return self.outputs[0] if self.plan.single else tuple(self.outputs)

    def timeout_error(self) -> CallTimeout:
        """What to raise when the deadline has passed."""
        age = (clock_ns() - self.begun_ns) / 1e9
        return CallTimeout(
            f"op {self.statistics.name!r}, call {self.call_id}: no completion after {age:.3f} s from {self.channel.peer_text()}; its blocks "
            "stay held until the worker is done with them; raise timeout= if the op needs longer"
        )

    def _error_of(self, completion: Completion) -> CallError:
        text = completion.body.decode("utf-8", "replace")
        name = self.statistics.name
        peer = self.channel.worker_name
        if completion.status == Status.OP_ERROR:
            type_name, _, message = text.partition("\n")
            return RemoteOpError(f"op {name!r} failed on worker {peer!r}: {type_name}: {message}", type_name)
        if completion.status == Status.BAD_FRAME:
            return BadFrame(f"worker {peer!r} rejected the frame of op {name!r}: {text}")
        if completion.status == Status.EXPIRED:
            return CallTimeout(f"op {name!r}, call {self.call_id}: its deadline had passed when worker {peer!r} took it; it was not run")
        if completion.status == Status.DRAINING:
            return WorkerDraining(
                f"op {name!r}, call {self.call_id}: worker {peer!r} is shutting down and did not run it; call another worker"
            )
        return CallError(f"op {name!r}, call {self.call_id}: worker {peer!r} answered with unknown status {completion.status}")


class _Waiters(list[Any]):
    """The future's list of waiters, as ``concurrent.futures.wait`` and ``as_completed`` use it.

    Whoever joins it will not call :meth:`CallFuture.result`, so the call must be completed in the background.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        _watch(self._call)


def _watch(call: Call) -> None:
    if not call.done:
        call.channel.completions.watch(call)


class CallFuture(concurrent.futures.Future[Result]):
    """A call that was submitted. A ``concurrent.futures.Future``, and awaitable in asyncio.

    The thread that asks for :meth:`result` takes the completion itself. Only when a callback is added, or the future is awaited, a background
    thread does. A call cannot be cancelled once it is submitted.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call
        self._waiters = _Waiters(call)
        self.set_running_or_notify_cancel()

    def settle(self) -> None:
        """Take over the outcome of the call, which knows its future no longer: they would keep each other, and the tensors, alive."""
        call = self._call
        call.future = None
        try:
            if call.error is not None:
                self.set_exception(call.error)
            else:
                self.set_result(call.result())
        except concurrent.futures.InvalidStateError:
            pass  # timed out before

    def result(self, timeout: float | None = None) -> Result:
        """The outputs. Raises the call's error; TimeoutError when they are not there after ``timeout`` seconds."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The call's error, or None. Raises TimeoutError when it is not done after ``timeout`` seconds."""
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        call = self._call
        if not self.done():
            call.channel.wait(call, timeout)
            if call.done:
                self.settle()  # by whoever is first: the thread that took the completion does so too

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Result]], object]) -> None:
        """Have ``fn(self)`` called when the call is done."""
        super().add_done_callback(fn)
        _watch(self._call)

    def __await__(self) -> Generator[Any, None, Result]:
        """Wait in an asyncio event loop."""
        return asyncio.wrap_future(self).__await__()
