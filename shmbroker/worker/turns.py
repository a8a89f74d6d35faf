"""Whose turn it is to use the device, among the threads that run calls: a lock that is given to the one whose call starts earliest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from shmbroker.worker.shares import Key


class Turns:
    """One call at a time. Who waits tells the key of what it wants to run (:meth:`Shares.key`), and the least has the next turn.

    Each thread has at most one turn, or waits for one. While nobody waits a turn costs what a lock does.
    """

    def __init__(self) -> None:
        self.device = threading.Lock()
        """Held for the length of a turn."""
        self._changed = threading.Condition()
        """Of the turn that ended, and of those that wait."""
        self.waiting: dict[int, Key] = {}
        """By thread, what it wants to run. Changed under ``_changed``; looked at without: a thread is in it before it looks whether the device is free."""

    def take(self, key: Key) -> None:
        """Wait until it is the turn of ``key``."""
        if self.waiting or not self.device.acquire(False):
            self.wait(key)

    @property
    def free(self) -> bool:
        """Whether nobody has a turn, and nobody waits for one."""
        return not self.waiting and not self.device.locked()

    def give_back(self) -> None:
        """The turn is over."""
        self.device.release()
        if self.waiting:
            with self._changed:
                self._changed.notify_all()

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """A block in which no call runs; it begins before any call that waits."""
        self.take((float("-inf"), 0.0, 0))
        try:
            yield
        finally:
            self.give_back()

    def wait(self, key: Key) -> None:
        """:meth:`take` where it is not to be had at once: ``waiting``, or ``device`` held."""
        thread = threading.get_ident()
        with self._changed:
            self.waiting[thread] = key
            try:
                while min(self.waiting.values()) < key or not self.device.acquire(False):
                    self._changed.wait()
            finally:
                del self.waiting[thread]
            if self.waiting:
                self._changed.notify_all()
