"""A bound op of a failover channel: called, submitted and captured, each call sent again when its worker is lost.

A call that a thread waits for is sent again by that thread. One that was submitted is sent again in the background, however it was found to be lost:
then somebody else may wait for it, or nobody.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch

from shmbroker.call.captured_call import CapturedCall
from shmbroker.call.future import CallFuture, WatchedFuture
from shmbroker.call.remote_op import RemoteOp
from shmbroker.client.channel import Channel
from shmbroker.errors import BadInput, ChannelError, ShmBrokerError, WorkerDraining, WorkerLost

_GONE = (WorkerLost, WorkerDraining)
"""Errors of a call that another worker may answer."""


class Successive(Protocol):
    """A channel that goes on with another worker, as its ops see it."""

    channel: Channel
    """The one in use."""

    def replace(self, lost: Channel, error: ShmBrokerError) -> None:
        """Have another worker take over from ``lost``. Raises ``error``'s kind when none comes in time."""

    def later(self, action: Callable[[], None]) -> None:
        """Have ``action()`` done in the background."""


class FailoverOp:
    """Made by :meth:`FailoverChannel.bind`. Called, submitted and captured like a :class:`RemoteOp`.

    :meth:`keep` is refused: what stays on a worker dies with it, and no other could go on from there.
    """

    __slots__ = ("_bind", "_bound", "_channel", "_lock", "name")

    def __init__(self, channel: Successive, name: str, bind: Callable[[Channel], RemoteOp]) -> None:
        self.name = name
        self._channel = channel
        self._bind = bind
        self._lock = threading.Lock()
        self._bound: tuple[Channel, RemoteOp] = (channel.channel, bind(channel.channel))

    def __repr__(self) -> str:
        return f"<FailoverOp {self.name!r} on {self._bound[0].peer_text()}>"

    def __call__(self, *inputs: torch.Tensor, **options: Any) -> Any:
        """As :meth:`RemoteOp.__call__`. ``timeout`` is that of each attempt."""
        while True:
            channel, op = self._bound
            try:
                return op(*inputs, **options)
            except _GONE as error:
                self.move(channel, error)

    def submit(self, *inputs: torch.Tensor, **options: Any) -> FailoverFuture:
        """As :meth:`RemoteOp.submit`. A call that is lost is sent again as soon as anybody looks for it, or waits."""

        def attempt() -> tuple[Channel, CallFuture]:
            while True:
                channel, op = self._bound
                try:
                    return channel, op.submit(*inputs, **options)
                except _GONE as error:
                    self.move(channel, error)

        return FailoverFuture(self, attempt)

    def keep(self, *inputs: torch.Tensor, **options: Any) -> NoReturn:
        """Refused with :class:`BadInput`: use a :meth:`Client.channel` for ops whose results stay on their worker."""
        raise BadInput(
            f"op {self.name!r} of a failover channel keeps nothing: what stays on a worker dies with it, and no other could go on from there; call it, "
            "or bind it on client.channel(...) for keep()"
        )

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> FailoverCapturedCall:
        """As :meth:`RemoteOp.capture`. After a failover outputs lie elsewhere: take what ``replay()`` returns."""
        return FailoverCapturedCall(self, inputs, arguments)

    def captured(self, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> tuple[Channel, CapturedCall]:
        """For :class:`FailoverCapturedCall`: captured on the worker of now."""
        channel, op = self._bound
        return channel, op.capture(*inputs, **arguments)

    def later(self, action: Callable[[], None]) -> None:
        """For :class:`FailoverFuture`: as of the channel."""
        self._channel.later(action)

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
        self._lock = threading.Lock()
        self._captured = op.captured(inputs, arguments)
        self.inputs = self._captured[1].inputs

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Where the worker of now writes."""
        return self._captured[1].outputs

    def replay(self, **options: Any) -> Any:
        """As :meth:`CapturedCall.replay`."""
        while True:
            channel, call = self._captured
            try:
                return call.replay(**options)
            except _GONE as error:
                self._capture_again(channel, error)

    def submit(self, **options: Any) -> FailoverFuture:
        """As :meth:`CapturedCall.submit`. A call that is lost is replayed as soon as anybody looks for it, or waits."""

        def attempt() -> tuple[Channel, CallFuture]:
            while True:
                channel, call = self._captured
                try:
                    return channel, call.submit(**options)
                except _GONE as error:
                    self._capture_again(channel, error)

        return FailoverFuture(self._op, attempt)

    def _capture_again(self, lost: Channel, error: ShmBrokerError) -> None:
        self._op.move(lost, error)
        with self._lock:
            if self._captured[0] is lost:  # another thread may have been faster
                self._captured = self._op.captured(self.inputs, self._arguments)

    def __repr__(self) -> str:
        return f"<FailoverCapturedCall of {self._op!r}>"


class FailoverFuture(WatchedFuture):
    """A call that is sent again when its worker is lost. Awaitable, and a ``concurrent.futures.Future``, as a :class:`CallFuture` is.

    ``attempt``: submits it to the worker of now. What a call without failover may raise at once, it raises here.
    """

    def __init__(self, op: FailoverOp, attempt: Callable[[], tuple[Channel, CallFuture]]) -> None:
        super().__init__()
        self._op = op
        self._again = attempt
        self._lock = threading.Lock()
        self._attempt: tuple[Channel, CallFuture] | None = attempt()
        """The one that counts; None while it is sent again, and when it is settled."""

    def look(self) -> None:
        """As of any watched future."""
        attempt = self._attempt
        if attempt is not None and attempt[1].done():
            self._over(attempt)

    def watch(self) -> None:
        """As of any watched future. While a call is sent again, the background has it anyway."""
        attempt = self._attempt
        if attempt is not None:
            self._watch(attempt)

    def _watch(self, attempt: tuple[Channel, CallFuture]) -> None:
        adding = True

        def over(future: object) -> None:
            current = self._attempt  # and not kept here: a future that is done keeps its callbacks
            if current is None or current[1] is not future:
                return
            if adding:  # done already, and called by this thread, which may hold the locks of other futures
                self._op.later(lambda: self._over(current))
            else:
                self._over(current)

        attempt[1].add_done_callback(over)
        adding = False

    def _over(self, attempt: tuple[Channel, CallFuture]) -> None:
        """An attempt is over: take over its outcome, or have it sent again. Whoever comes second does nothing."""
        with self._lock:
            if self._attempt is not attempt:
                return
            self._attempt = None
        channel, future = attempt
        error = future.exception(0)
        if isinstance(error, _GONE):
            lost = error
            self._op.later(lambda: self._send_again(channel, lost))
            return
        self._again = _settled  # it holds the inputs
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(future.result(0))

    def _send_again(self, channel: Channel, error: ShmBrokerError) -> None:
        """In the background, which watches the new attempt too: nobody else knows of it."""
        try:
            self._op.move(channel, error)
            attempt = self._again()
        except BaseException as final:
            self._again = _settled
            self.set_exception(final)
            return
        self._attempt = attempt
        self._watch(attempt)

    def fetch(self, timeout: float | None) -> None:
        """As of any watched future. ``timeout`` is for all attempts together."""
        until = None if timeout is None else time.monotonic() + timeout
        attempt = self._attempt
        if attempt is not None:
            attempt[1].exception(timeout)
            self._over(attempt)
        concurrent.futures.Future.exception(self, None if until is None else max(0.0, until - time.monotonic()))


def _settled() -> NoReturn:
    raise AssertionError("a call that is settled is not sent again")
