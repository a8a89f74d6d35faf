"""The future that stands for a call that was submitted."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

from shmbroker.call.call import Call, Result
from shmbroker.call.state import DONE


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
    if call.state is not DONE:
        call.plan.carrier.completions.watch(call)


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
            if not call.plan.carrier.wait(call, timeout):
                raise TimeoutError(f"op {call.statistics.name!r}, call {call.call_id} is not done after {timeout:g} s")
            if call.state is DONE:
                self.settle()  # by whoever is first: the thread that took the completion does so too

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Result]], object]) -> None:
        """Have ``fn(self)`` called when the call is done."""
        super().add_done_callback(fn)
        _watch(self._call)

    def __await__(self) -> Generator[Any, None, Result]:
        """Wait in an asyncio event loop."""
        return asyncio.wrap_future(self).__await__()
