"""Waiting for frames: look for a little while, then block on the doorbell (D1..D3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shmbroker.lane.core import spin
from shmbroker.lane.doorbell import RECHECK_SECONDS, PollingBell, SemaphoreBell, fence
from shmbroker.lane.ends import Receiver

DEFAULT_SPIN_SECONDS = 50e-6
"""How long to look before blocking: about what blocking and being woken costs (46 us on the reference machine)."""


class Waiter:
    """Waits for frames: looks for ``spin_seconds``, then blocks on the process's bell."""

    __slots__ = ("_bell", "_spin_seconds", "sleeping")

    def __init__(
        self, bell: SemaphoreBell | PollingBell, spin_seconds: float = DEFAULT_SPIN_SECONDS, sleeping: Sequence[tuple[memoryview, int]] = ()
    ) -> None:
        self._bell = bell
        self._spin_seconds = min(spin_seconds, RECHECK_SECONDS)
        self.sleeping = sleeping
        """The words (memory, index) to set while blocked, one for each peer that may ring."""

    def wait(self, ready: Callable[[], bool], receivers: tuple[Receiver, ...], seconds: float) -> bool:
        """Wait until ``ready()``, for ``min(seconds, RECHECK_SECONDS)`` at most; returns what ``ready()`` says in the end.

        ``receivers``: where frames come from, looked at while spinning; ``ready()`` is true when one of them is, and may know of more.
        """
        spin_seconds = self._spin_seconds
        if spin_seconds and receivers and spin(receivers, spin_seconds if spin_seconds < seconds else seconds):
            return True
        if ready():
            return True
        bell = self._bell
        if isinstance(bell, PollingBell):
            until = time.monotonic() + min(seconds, RECHECK_SECONDS)
            bell.rested()
            while not ready():
                left = until - time.monotonic()
                if left <= 0:
                    return False
                bell.wait(left)
            return True
        sleeping = self.sleeping
        for words, index in sleeping:
            words[index] = 1
        try:
            fence()
            if ready():
                return True
            bell.wait(min(seconds, RECHECK_SECONDS))
        finally:
            for words, index in sleeping:
                words[index] = 0
        return ready()
