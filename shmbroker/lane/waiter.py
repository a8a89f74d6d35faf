"""Waiting for frames: look for a little while, then block on the doorbell (D1..D3).

How long is a little while: ``spin_seconds``, and where the last wait was a short one, ``LINGER_SECONDS``. Being woken costs some 100 us on a machine
whose cores doze off, a quarter of what a decode step's call takes; a call in a series of such takes about as long as the one before. While it lingers, a
process gives its core to whoever wants it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shmbroker.lane.doorbell import RECHECK_SECONDS, PollingBell, SemaphoreBell
from shmbroker.lane.ends import after_sleep, before_sleep, spin
from shmbroker.lane.python_ends import Receiver
from shmbroker.settings.schema import DEFAULTS

DEFAULT_SPIN_SECONDS = DEFAULTS.spin * 1e-6


LINGER_SECONDS = 3e-3
"""How long to look where the last wait was no longer than this: ten times what being woken costs."""


class Waiter:
    """Waits for frames: looks for ``spin_seconds``, then blocks on the process's bell."""

    __slots__ = ("_bell", "_last_seconds", "_spin_seconds", "sleeping")

    def __init__(
        self, bell: SemaphoreBell | PollingBell, spin_seconds: float = DEFAULT_SPIN_SECONDS, sleeping: Sequence[tuple[memoryview, int]] = ()
    ) -> None:
        self._bell = bell
        self._spin_seconds = min(spin_seconds, RECHECK_SECONDS)
        self._last_seconds = 0.0
        """How long the last wait took: what the next one is expected to take."""
        self.sleeping = sleeping
        """The words (memory, index) to set while blocked, one for each peer that may ring."""

    def wait(self, ready: Callable[[], bool], receivers: tuple[Receiver, ...], seconds: float) -> bool:
        """Wait until ``ready()``, for ``min(seconds, RECHECK_SECONDS)`` at most; returns what ``ready()`` says in the end.

        ``receivers``: where frames come from, looked at while spinning; ``ready()`` is true when one of them is, and may know of more.
        """
        begun = time.monotonic()
        try:
            return self._wait(ready, receivers, seconds)
        finally:
            self._last_seconds = time.monotonic() - begun

    def _wait(self, ready: Callable[[], bool], receivers: tuple[Receiver, ...], seconds: float) -> bool:
        look_seconds = self._spin_seconds
        if look_seconds and receivers:
            if look_seconds < LINGER_SECONDS and self._last_seconds < LINGER_SECONDS:
                look_seconds = LINGER_SECONDS
            if spin(receivers, min(look_seconds, seconds)):
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
        try:
            before_sleep(sleeping)
            if ready():
                return True
            bell.wait(min(seconds, RECHECK_SECONDS))
        finally:
            after_sleep(sleeping)
        return ready()
