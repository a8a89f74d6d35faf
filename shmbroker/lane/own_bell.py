"""The doorbell that a process sleeps on: held for life (H1), and reachable under its name for as long.

Its name can be taken away under it: systemd-logind removes what a user has in shared memory at logout (``RemoveIPC=yes``). Who has opened the doorbell
rings on; for those who come later another semaphore is made under the name, and a thread passes its rings on (D2: a ring is a hint, so one more or
less does no harm; D3 bounds what a late one costs).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable

from shmbroker.lane.doorbell import RECHECK_SECONDS, SemaphoreBell
from shmbroker.memory import names
from shmbroker.memory.hold import Hold, unlink_own

log = logging.getLogger(__name__)


class OwnBell:
    """``make``: has the broker make a semaphore of this process's name, and returns the name. Raises what that raises."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self.steps: list[Callable[[], object]] = []
        """What gives it up, to be done from the last to the first; a second time each does nothing."""
        self._closed = False
        self.bell, self._hold = self._made()
        """What this process sleeps on."""

    @property
    def name(self) -> str:
        """What others open it by."""
        return self.bell.name

    def _made(self) -> tuple[SemaphoreBell, Hold]:
        name = self._make()
        with contextlib.ExitStack() as undo:
            # fault: before bell held
            hold = Hold.on(names.bell_path(name))
            # fault: after bell held
            undo.callback(unlink_own, names.bell_path(name))
            undo.callback(hold.release)
            bell = SemaphoreBell(name)
            undo.callback(bell.close)
            self.steps += [functools.partial(unlink_own, names.bell_path(name)), hold.release, bell.close]
            undo.pop_all()
        return bell, hold

    def ensure_named(self) -> None:
        """Have another semaphore made under the name where that was taken away. Called by one thread at a time."""
        if self._hold.is_at(names.bell_path(self.name)):
            return
        log.warning("the name of doorbell %s was taken away, as systemd-logind does at logout (RemoveIPC=yes): made anew", self.name)
        anew, self._hold = self._made()
        passing = threading.Thread(target=self._pass_on, args=(anew,), name="shmbroker-bell", daemon=True)
        passing.start()
        self.steps.append(functools.partial(self._stop, passing))  # before its semaphore is closed under it

    def _pass_on(self, anew: SemaphoreBell) -> None:
        while not self._closed:
            if anew.wait(RECHECK_SECONDS):
                self.bell.ring()

    def _stop(self, passing: threading.Thread) -> None:
        self._closed = True
        passing.join()

    def close(self) -> None:
        """Give it up, and take its name away: all steps, whatever one of them raises."""
        with contextlib.ExitStack() as undo:
            for step in self.steps:
                undo.callback(step)
