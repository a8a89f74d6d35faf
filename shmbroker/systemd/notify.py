"""Telling systemd how a service is doing: datagrams to ``$NOTIFY_SOCKET`` (sd_notify(3)). Where there is none, nothing is done.

A service manager restarts what stopped feeding its watchdog. It is fed by the loops that do the work, each time they turn, and only while all of them do:
a thread that lives on when another hangs does not hide it.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import time

log = logging.getLogger(__name__)

SOCKET_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_MICROSECONDS_VARIABLE = "WATCHDOG_USEC"
WATCHDOG_PID_VARIABLE = "WATCHDOG_PID"

FEEDS_PER_TIMEOUT = 4
"""sd_watchdog_enabled(3) recommends two; a busy machine may be late with one."""

_HUNG_PER_TIMEOUT = 0.5
"""The part of the timeout after which a loop that did not turn counts as hung, where others turn: it is killed within 1.5 timeouts."""


def tell(*lines: str) -> bool:
    """Send assignments like ``READY=1``; returns whether somebody was there to be told. A manager that cannot be told is no reason to fail."""
    told = os.environ.get(SOCKET_VARIABLE, "")
    if not told.startswith(("/", "@")):
        return False
    # A leading @ stands for the zero byte of an abstract name.
    address = "\0" + told[1:] if told[0] == "@" else told
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_manager:
            to_manager.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.debug("%s cannot be told %s: %s", told, lines[0], error)
        return False
    return True


def ready(status: str = "") -> bool:
    """The service can be used from now on. ``status``: a line for ``systemctl status``."""
    return tell("READY=1", *([f"STATUS={status}"] if status else []))


def stopping() -> bool:
    """The service finishes what it has begun, and ends."""
    return tell("STOPPING=1")


def watchdog() -> None:
    """Feed the watchdog, for a service with one loop. To be called each time it turns: a datagram is sent when one is due. Thread-safe."""
    fed = of_process()
    if fed is not None:
        fed.turning("loop")


class Watchdog:
    """Feeds the service manager's watchdog while every loop that ever called :meth:`turning` still does so. Thread-safe."""

    __slots__ = ("_due", "_feed_seconds", "_hung_seconds", "_turned")

    def __init__(self, timeout: float) -> None:
        self._feed_seconds = timeout / FEEDS_PER_TIMEOUT
        self._hung_seconds = timeout * _HUNG_PER_TIMEOUT
        self._turned: dict[str, float] = {}
        """By loop, when it last turned."""
        self._due = 0.0

    @classmethod
    def of_environment(cls) -> Watchdog | None:
        """The one that the service manager told this process to feed; None where there is none, or it is meant for another process."""
        told = os.environ.get(WATCHDOG_MICROSECONDS_VARIABLE, "")
        pid = os.environ.get(WATCHDOG_PID_VARIABLE, "") or str(os.getpid())
        if not os.environ.get(SOCKET_VARIABLE) or pid != str(os.getpid()) or not told.isdecimal() or int(told) == 0:
            return None
        return cls(int(told) * 1e-6)

    def turning(self, loop: str) -> None:
        """``loop`` turns. It must do so at least every half of the timeout; what it does between two turns may take longer now and then."""
        now = time.monotonic()
        self._turned[loop] = now
        if now >= self._due and now - min(list(self._turned.values())) < self._hung_seconds:
            self._due = now + self._feed_seconds
            tell("WATCHDOG=1")


@functools.cache
def of_process() -> Watchdog | None:
    """:meth:`Watchdog.of_environment`, asked for once in the life of the process."""
    return Watchdog.of_environment()
