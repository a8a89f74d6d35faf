"""Doorbells for tests: one that only notes what is asked of it, the names of real ones, and a wait on either."""

from __future__ import annotations

from collections.abc import Callable

from shmbroker.lane.doorbell import PollingBell, SemaphoreBell
from shmbroker.lane.waiter import Waiter

BellNames = tuple[str, str]
"""The POSIX names of the client's and the worker's semaphore."""

NEVER_SECONDS = 600.0
"""Put for the recheck bound: nobody is healed by it in time."""

DEADLINE_SECONDS = 200.0
"""Of a whole test with two processes or threads: many times what it takes."""


class RecordingBell(SemaphoreBell):
    """Notes what is asked of it, and does :attr:`on_wait` while the waiter is blocked."""

    __slots__ = ("on_wait", "rung", "waits")

    def __init__(self, on_wait: Callable[[], object] = lambda: None) -> None:
        self.waits: list[float] = []
        self.rung = 0
        self.on_wait = on_wait

    def ring(self) -> None:
        self.rung += 1

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.on_wait()

    def close(self) -> None:
        pass


def both_bells(bell_names: BellNames) -> list[SemaphoreBell | PollingBell]:
    """One of each kind."""
    return [SemaphoreBell(bell_names[0]), PollingBell()]


def wait_ready(waiter: Waiter, ready: Callable[[], bool], sleeping: list[tuple[memoryview, int]], seconds: float) -> bool:
    """Wait where nothing but ``ready`` tells that something came."""
    waiter.sleeping = sleeping
    return waiter.wait(ready, (), seconds)
