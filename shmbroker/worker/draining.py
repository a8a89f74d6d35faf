"""Draining: a worker that is told to stop finishes what runs, and waits for it so long and no longer."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
"""How long what runs may take to finish after SIGTERM or SIGINT; systemd would send SIGKILL after 90 s."""


class Stop:
    """Whether a worker is to stop: requested once, seen by each of its loops when it turns.

    Any thread may request it, and a signal handler too: a plain attribute takes no lock that the interrupted thread might hold.
    """

    __slots__ = ("requested",)

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Have all loops that look at this end soon."""
        self.requested = True


@contextlib.contextmanager
def drained_by_signals(stop: Stop, name: str) -> Iterator[None]:
    """A block in which SIGTERM and SIGINT request ``stop``. Whoever has not left it :data:`DRAIN_SECONDS` later ends there, with status 0.

    ``name``: of the worker, for the log. Nothing is done in a thread that is not the main one: signals are not for it to handle.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.request()

    # Python runs a handler between two lines of Python only: an op that computes for a minute is to be seen by another thread meanwhile.
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(read_fd, True)
    left = threading.Event()
    watcher = threading.Thread(target=_end_in_time, args=(read_fd, left, stop, name), name="shmbroker-drain", daemon=True)
    previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    watcher.start()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        left.set()
        os.close(write_fd)
        watcher.join()
        os.close(read_fd)


def _end_in_time(read_fd: int, left: threading.Event, stop: Stop, name: str) -> None:
    """After a signal, an op that takes longer than :data:`DRAIN_SECONDS` is not waited for: the process's end tells its client."""
    while number := os.read(read_fd, 1):
        if number[0] in (signal.SIGTERM, signal.SIGINT):
            stop.request()
            if not left.wait(DRAIN_SECONDS):
                log.warning("%s: an op still runs %g s after the signal to stop: ending without it", name, DRAIN_SECONDS)
                logging.shutdown()
                os._exit(0)
