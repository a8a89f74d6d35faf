"""Work in threads of their own: its end is waited for, its error is the test's, and who is stuck fails the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

STUCK_SECONDS = 120.0
"""Far beyond what any of this takes: who is not done by then is stuck."""

Result = TypeVar("Result")


class InThread(Generic[Result]):
    """``work()``, begun at once in a thread of its own."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._outcome: list[Result] = []
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:
            self._failure.append(error)

    @property
    def ident(self) -> int:
        """Of the thread."""
        assert self._thread.ident is not None
        return self._thread.ident

    @property
    def running(self) -> bool:
        """Whether it is not done yet."""
        return self._thread.is_alive()

    def join(self) -> Result:
        """Wait for its end: its result, or what it raised raised here."""
        self._thread.join(STUCK_SECONDS)
        assert not self._thread.is_alive(), "stuck"
        if self._failure:
            raise self._failure[0]
        return self._outcome[0]
