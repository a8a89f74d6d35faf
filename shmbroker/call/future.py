"""The future that stands for a call that was submitted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import weakref
from collections.abc import Callable, Generator
from typing import Any

from shmbroker.call.call import Call, Result
from shmbroker.call.state import DONE
from shmbroker.errors import ShmBrokerError, anew


class WatchedFuture(concurrent.futures.Future[Result]):
    """A ``concurrent.futures.Future`` whose outcome somebody must fetch: awaitable, and good for ``wait`` and ``as_completed``.

    Who calls :meth:`result` fetches it himself, and who asks :meth:`done` looks whether it is there. Who does neither, but adds a callback, awaits
    it or waits for several, has it :meth:`watched` in the background.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiters = _Waiters(self)
        self.set_running_or_notify_cancel()

    def look(self) -> None:
        """Take over the outcome if it is there. Never waits."""
        raise NotImplementedError

    def watch(self) -> None:
        """Have the outcome taken over in the background, by another thread than this one."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Whether the outcome was taken over. Looks for nothing."""
        return super().done()

    def result(self, timeout: float | None = None) -> Result:
        """The outputs. Raises the call's error, a new one each time; TimeoutError when they are not there after ``timeout`` seconds."""
        error = self.exception(timeout)
        if error is not None:
            raise anew(error)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The call's error, or None. Raises TimeoutError when it is not done after ``timeout`` seconds."""
        self.fetch(timeout)
        return super().exception(0)

    def fetch(self, timeout: float | None) -> None:
        """Wait for the outcome, and take it over. Raises TimeoutError when it is not there after ``timeout`` seconds."""
        raise NotImplementedError

    def done(self) -> bool:
        """Whether the call is done, or its deadline has passed. Looks for its completion, and does not wait for it."""
        if not super().done():
            self.look()
        return super().done()

    def running(self) -> bool:
        """The contrary of :meth:`done`: a call that was submitted cannot be cancelled any more."""
        return not self.done()

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Result]], object]) -> None:
        """Have ``fn(self)`` called when the call is done: in whichever thread finds that it is, so that it must not block for long."""
        super().add_done_callback(fn)
        self.watch()

    def __await__(self) -> Generator[Any, None, Result]:
        """Wait in an asyncio event loop."""
        return asyncio.wrap_future(self).__await__()


class _Waiters(list[Any]):
    """The future's list of waiters, as ``concurrent.futures.wait`` and ``as_completed`` use it: whoever joins it will not ask for the result himself.

    It is joined with the locks of several futures held: nothing may be settled in that thread.
    """

    def __init__(self, future: WatchedFuture) -> None:
        super().__init__()
        self._future = weakref.ref(future)
        """Weak: a future that nobody holds lets its tensors go at once."""

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        future = self._future()
        if future is not None:
            future.watch()


class CallFuture(WatchedFuture):
    """A call that was submitted. A ``concurrent.futures.Future``, and awaitable in asyncio.

    The thread that asks for :meth:`result`, or whether it is :meth:`done`, takes the completion itself. Only when a callback is added, or the future
    is awaited, a background thread does. A call cannot be cancelled once it is submitted. An answer that came after the call's deadline is an error,
    whenever it is looked for.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def settle(self) -> None:
        """Take over the outcome of the call, which knows its future no longer: they would keep each other, and the tensors, alive."""
        call = self._call
        call.future = None
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # timed out before
            try:
                result = call.result()
            except ShmBrokerError as error:
                self.set_exception(anew(error))
            else:
                self.set_result(result)

    def look(self) -> None:
        """As of any watched future."""
        call = self._call
        if not call.plan.carrier.look(call):
            return
        if call.state is DONE and not self.settled():
            self.settle()  # by whoever is first: the thread that took the completion does so too

    def watch(self) -> None:
        """As of any watched future."""
        if self._call.state is not DONE:
            self._call.plan.carrier.completions.watch(self._call)

    def fetch(self, timeout: float | None) -> None:
        """As of any watched future."""
        call = self._call
        if not self.settled():
            if not call.plan.carrier.wait(call, timeout):
                raise TimeoutError(f"op {call.statistics.name!r}, call {call.call_id} is not done after {timeout:g} s")
            if call.state is DONE:
                self.settle()
