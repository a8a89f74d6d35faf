"""Failover: a channel that goes on with another worker of the same service when its own dies or drains.

The client holds inputs and output room of every call, so a call that was lost is sent again, to whoever takes over: its op may so be run twice, and
must be one that can be (a function of its inputs; no state on the worker). What a dead worker has half written is never looked at.

A worker takes over only if it tells the same identity as the first one (``Worker(identity=...)``): another model's answer would be a wrong answer.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from shmbroker.call.call import Result
from shmbroker.call.client_memory import ClientMemory
from shmbroker.call.future import CallFuture
from shmbroker.call.remote_op import CapturedCall, RemoteOp
from shmbroker.call.report import Report
from shmbroker.call.statistics import OpStatistics
from shmbroker.client.channel import Channel
from shmbroker.errors import BadInput, ChannelError, NoSuchService, ShmBrokerError, WorkerDraining, WorkerLost
from shmbroker.lane.outputs import OutSpec

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05

Open = Callable[[frozenset[str]], Channel]
"""Opens a channel to a worker that is none of these. Raises :class:`NoSuchService` when there is none."""

_GONE = (WorkerLost, WorkerDraining)


class FailoverChannel:
    """Made by :meth:`Client.failover_channel`; used like a :class:`Channel`. Thread-safe."""

    def __init__(self, memory: ClientMemory, service: str, open_channel: Open, patience: float) -> None:
        self.memory = memory
        self.service = service
        self.patience = patience
        self.failovers = 0
        """How often another worker has taken over."""
        self._open = open_channel
        self._lock = threading.Lock()
        self._passed_over: set[str] = set()
        self._closed = False
        self._statistics: list[OpStatistics] = []
        self._socket_bytes = 0
        self._counted: Channel | None = None
        """The lost channel whose bytes are counted already."""
        self.channel = open_channel(frozenset())
        """The one in use."""

    @property
    def lane(self) -> str:
        """Of the channel in use; so are ``doorbell``, ``control``, ``worker_name`` and ``worker_pid``."""
        return self.channel.lane

    @property
    def doorbell(self) -> str:
        """See ``lane``."""
        return self.channel.doorbell

    @property
    def control(self) -> str:
        """See ``lane``."""
        return self.channel.control

    @property
    def worker_name(self) -> str:
        """See ``lane``."""
        return self.channel.worker_name

    @property
    def worker_pid(self) -> int:
        """See ``lane``."""
        return self.channel.worker_pid

    def bind(self, op: str, *, out_spec: OutSpec | None = None, **static: Any) -> FailoverOp:
        """As :meth:`Channel.bind`; bound anew on each worker that takes over."""
        statistics = OpStatistics(op)
        self._statistics.append(statistics)

        def bind(channel: Channel) -> RemoteOp:
            bound = channel.bind_counted(op, statistics, out_spec=out_spec, **static)
            if bound.in_place:
                raise BadInput(
                    f"op {op!r} works in place: sent again to another worker, it would read what the first one has half written; bind it on a "
                    "client.channel()"
                )
            return bound

        return FailoverOp(self, op, bind)

    def replace(self, lost: Channel, error: ShmBrokerError) -> None:
        """Have another worker take over from ``lost``, unless one has already. Raises ``error``'s kind when none comes in time."""
        with self._lock:
            if self._closed:
                raise error
            if self.channel is not lost:
                return
            log.warning("%s; looking for another worker that offers %r", error, self.service)
            self._replace(lost, error, self.patience)

    def _replace(self, lost: Channel, error: ShmBrokerError, patience: float) -> None:
        """With the lock held."""
        begun = time.monotonic()
        self._passed_over.add(lost.worker_id)
        if self._counted is not lost:  # an earlier attempt may have found nobody
            self._counted = lost
            self._socket_bytes += lost.report().socket_bytes
        lost.close()
        self.channel = self._next(lost, error, begun + patience)
        self.failovers += 1
        log.warning(
            "worker %r (pid %d) took over after %.2f s", self.channel.worker_name, self.channel.worker_pid, time.monotonic() - begun
        )

    def trouble(self) -> str:
        """Why no call could be made now, in words; empty when one can. If the worker is dead, and another can take over, it does so now.

        Never waits for a worker that is not there yet.
        """
        channel = self.channel
        error = channel.loss()
        if error is None:
            return ""
        if self._closed:
            return "the channel is closed"
        if not self._lock.acquire(blocking=False):
            return f"{error}; a call is waiting for another worker"
        try:
            if self.channel is channel:
                self._replace(channel, error, 0.0)
        except ShmBrokerError as reason:
            return str(reason)
        finally:
            self._lock.release()
        return ""

    def _next(self, lost: Channel, error: ShmBrokerError, until: float) -> Channel:
        refused = ""
        while True:
            try:
                found = self._open(frozenset(self._passed_over))
            except (NoSuchService, ShmBrokerError) as why:
                if not isinstance(why, NoSuchService):
                    refused = f" ({why})"
            else:
                if found.identity == lost.identity:
                    return found
                refused = f" (worker {found.worker_name!r} offers it with other weights or ops: {found.identity}, not {lost.identity})"
                self._passed_over.add(found.worker_id)
                found.close()
            if time.monotonic() >= until or self._closed:
                raise WorkerLost(
                    f"{error}; none took over within {self.patience:g} s{refused}: start one, or wait longer (--failover)"
                ) from None
            time.sleep(_LOOK_SECONDS)

    def report(self) -> Report:
        """As :meth:`Channel.report`, over all workers so far; tells how often another one took over."""
        channel = self.channel
        socket_bytes = self._socket_bytes + channel.report().socket_bytes
        return Report.of(self._statistics, channel.lane, channel.doorbell, channel.control, socket_bytes, self.failovers, channel.device)

    def forget_statistics(self) -> None:
        """As :meth:`Channel.forget_statistics`, of all ops, whichever worker they are bound on."""
        for one in self._statistics:
            one.reset()
        self.channel.forget_statistics()

    def close(self) -> None:
        """Close the channel in use; nobody takes over any more."""
        self._closed = True
        self.channel.close()


class FailoverOp:
    """Made by :meth:`FailoverChannel.bind`. Called, submitted and captured like a :class:`RemoteOp`.

    Without ``keep``: what stays on a worker dies with it, and no other could go on from there.
    """

    __slots__ = ("_bind", "_bound", "_channel", "_lock", "name")

    def __init__(self, channel: FailoverChannel, name: str, bind: Callable[[Channel], RemoteOp]) -> None:
        self.name = name
        self._channel = channel
        self._bind = bind
        self._lock = threading.Lock()
        self._bound: tuple[Channel, RemoteOp] = (channel.channel, bind(channel.channel))

    def __repr__(self) -> str:
        return f"<FailoverOp {self.name!r} on {self._channel.worker_name!r}>"

    def __call__(self, *inputs: torch.Tensor, **options: Any) -> Any:
        """As :meth:`RemoteOp.__call__`. ``timeout`` is that of each attempt."""
        while True:
            channel, op = self._bound
            try:
                return op(*inputs, **options)
            except _GONE as error:
                self.move(channel, error)

    def submit(self, *inputs: torch.Tensor, **options: Any) -> FailoverFuture:
        """As :meth:`RemoteOp.submit`. A call that is lost is sent again when its result is asked for, or a callback waits for it."""
        while True:
            channel, op = self._bound
            try:
                return FailoverFuture(self, channel, op.submit(*inputs, **options), lambda: self(*inputs, **options))
            except _GONE as error:
                self.move(channel, error)

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> FailoverCapturedCall:
        """As :meth:`RemoteOp.capture`. After a failover outputs lie elsewhere: take what ``replay()`` returns."""
        return FailoverCapturedCall(self, inputs, arguments)

    def captured(self, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> tuple[Channel, CapturedCall]:
        """For :class:`FailoverCapturedCall`: captured on the worker of now."""
        channel, op = self._bound
        return channel, op.capture(*inputs, **arguments)

    def move(self, lost: Channel, error: ShmBrokerError) -> None:
        """Bind on another worker after ``error`` on the channel ``lost``."""
        while True:
            self._channel.replace(lost, error)
            with self._lock:
                channel = self._channel.channel
                if self._bound[0] is channel:
                    return
                try:
                    self._bound = channel, self._bind(channel)
                    return
                except (WorkerLost, ChannelError) as again:
                    lost, error = channel, again


class FailoverCapturedCall:
    """Made by :meth:`FailoverOp.capture`; replayed and submitted like a :class:`CapturedCall`."""

    def __init__(self, op: FailoverOp, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> None:
        self._op = op
        self._arguments = arguments
        self._channel, self._call = op.captured(inputs, arguments)
        self.inputs = self._call.inputs

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Where the worker of now writes."""
        return self._call.outputs

    def replay(self, **options: Any) -> Any:
        """As :meth:`CapturedCall.replay`."""
        while True:
            try:
                return self._call.replay(**options)
            except _GONE as error:
                self._capture_again(error)

    def submit(self, **options: Any) -> FailoverFuture:
        """As :meth:`CapturedCall.submit`. A call that is lost is replayed when its result is asked for, or a callback waits for it."""
        while True:
            try:
                return FailoverFuture(self._op, self._channel, self._call.submit(**options), lambda: self.replay(**options))
            except _GONE as error:
                self._capture_again(error)

    def _capture_again(self, error: ShmBrokerError) -> None:
        self._op.move(self._channel, error)
        self._channel, self._call = self._op.captured(self.inputs, self._arguments)


class FailoverFuture(concurrent.futures.Future[Result]):
    """A call that is sent again when its worker is lost. The thread that asks for the result does that."""

    def __init__(self, op: FailoverOp, channel: Channel, future: CallFuture, again: Callable[[], Any]) -> None:
        super().__init__()
        self._op = op
        self._channel = channel
        self._future = future
        self._again: Callable[[], Any] | None = again
        self._settling = threading.Lock()
        self.set_running_or_notify_cancel()

    def _settle(self, timeout: float | None) -> None:
        future_error = self._future.exception(timeout)
        with self._settling:
            again, self._again = self._again, None
            if again is None:
                return  # settled
            try:
                if not isinstance(future_error, _GONE):
                    if future_error is not None:
                        raise future_error
                    result = self._future.result(0)
                else:
                    self._op.move(self._channel, future_error)
                    result = again()
            except BaseException as error:
                self.set_exception(error)
            else:
                self.set_result(result)

    def result(self, timeout: float | None = None) -> Result:
        """As :meth:`CallFuture.result`. ``timeout`` bounds the first attempt."""
        if not self.done():
            self._settle(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As :meth:`CallFuture.exception`."""
        if not self.done():
            self._settle(timeout)
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Result]], object]) -> None:
        """Have ``fn(self)`` called when the call is done."""
        super().add_done_callback(fn)
        self._future.add_done_callback(lambda future: self._settle(None))
