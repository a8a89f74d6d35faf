"""Doorbells: how a process that waits for frames is woken.

Every process sleeps on one bell, whatever it waits for; whoever writes it a frame rings. Only a sleeper is rung for::

    sleeper   sleeping = 1; fence; look again; block; sleeping = 0
    writer    publish;      fence; if sleeping: sleeping = 0; ring

D1  Between its word and its look (or its frame and its look at the word) each side has a full fence, so at least one sees the other.
D2  A ring is a hint: after every wake-up all state is read again.
D3  No wait lasts longer than ``RECHECK_SECONDS`` before the state and the peer's liveness are looked at again.
D4  Who rings takes the word down, and then rings (a post releases: the 0 is seen first), so a sleeper is rung for once; it puts the word up again before it
    blocks again. So a writer may ring a moment before it publishes (``nudge``): waking takes longer than writing the frame, and a sleeper that
    was faster looks, and sleeps again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import posix_ipc

from shmbroker.errors import ChannelError
from shmbroker.memory import names
from shmbroker.settings.kinds import Doorbell

RECHECK_SECONDS = 0.1
"""D3. Bounds what a lost ring or a dead peer can cost."""

_POLL_FIRST_SECONDS = 20e-6
_POLL_LAST_SECONDS = 1e-3
"""Back-off of the polling doorbell: 1 ms costs an idle waiter well under 1 % of a CPU."""

_fence_lock = threading.Lock()


def fence() -> None:
    """A full memory barrier on x86-64: taking a lock is a locked instruction there, which orders an earlier store before a later load.

    Elsewhere it is none; there the compiled ends are used, or lane zmq.
    """
    _fence_lock.acquire()
    _fence_lock.release()


class SemaphoreBell:
    """A named POSIX semaphore, made by the broker."""

    __slots__ = ("_semaphore", "name")

    kind = Doorbell.SEM

    def __init__(self, name: str) -> None:
        self.name = name
        # A peer may tell any name, and posix_ipc crashes on one with a zero in it.
        if names.parse(names.bell_path(name).removeprefix(f"{names.SHM_DIR}/")) is None:
            raise ChannelError(f"{name!r} is not the name of a doorbell")
        try:
            self._semaphore = posix_ipc.Semaphore(name)
        except posix_ipc.ExistentialError:
            raise ChannelError(f"doorbell {name} does not exist: the process that slept on it is gone") from None
        except posix_ipc.PermissionsError:
            raise ChannelError(
                f"doorbell {name} may not be opened by user {os.geteuid()}: run as the user it belongs to, start the broker with --group and "
                "a group that both are in, or use doorbell poll"
            ) from None

    def ring(self) -> None:
        """Wake who sleeps on it."""
        try:
            self._semaphore.release()
        except OSError:
            pass  # rung more often than it can count, by somebody who means no good: whoever sleeps on it is awake

    def wait(self, seconds: float) -> bool:
        """Block until rung, for ``seconds`` at most; returns whether it was."""
        try:
            self._semaphore.acquire(seconds)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    def close(self) -> None:
        """Give the semaphore up; its name stays. A second time does nothing."""
        with contextlib.suppress(posix_ipc.ExistentialError):  # closed before
            self._semaphore.close()


class PollingBell:
    """No bell: the sleeper naps, a little longer each time until :meth:`rested`."""

    __slots__ = ("_nap",)

    kind = Doorbell.POLL

    def __init__(self) -> None:
        self._nap = _POLL_FIRST_SECONDS

    def wait(self, seconds: float) -> None:
        """Nap."""
        time.sleep(min(self._nap, seconds))
        self._nap = min(self._nap * 2, _POLL_LAST_SECONDS)

    def ring(self) -> None:
        """Nobody hears; the sleeper looks by itself."""

    def rested(self) -> None:
        """Start over with short naps: something came."""
        self._nap = _POLL_FIRST_SECONDS

    def close(self) -> None:
        """Nothing to give up."""
