"""Sockets that the service manager listens on and hands to a service, which need not, and in its sandbox could not, make them (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket

PID_VARIABLE = "LISTEN_PID"
COUNT_VARIABLE = "LISTEN_FDS"
NAMES_VARIABLE = "LISTEN_FDNAMES"

FIRST = 3
"""Of the descriptors: behind standard input, output and error."""


def passed(name: str) -> list[socket.socket]:
    """Those that are so named (``FileDescriptorName=``), for the caller to close; none where the process was handed none. To be asked for once."""
    count = os.environ.get(COUNT_VARIABLE, "")
    if os.environ.get(PID_VARIABLE) != str(os.getpid()) or not count.isdecimal():
        return []
    names = os.environ.get(NAMES_VARIABLE, "").split(":")[: int(count)]
    found = [socket.socket(fileno=FIRST + index) for index, one in enumerate(names) if one == name]
    for one in found:
        one.set_inheritable(False)
    return found
