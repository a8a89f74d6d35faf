"""The names of lanes and doorbells, as they appear in messages, reports and command lines."""

from __future__ import annotations

import enum


class Lane(str, enum.Enum):
    """What carries the frames of a channel."""

    SHM = "shm"
    """Queues in the client's segment; the default."""
    ZMQ = "zmq"
    """A ZeroMQ socket; always works."""


class Doorbell(str, enum.Enum):
    """What wakes a process that waits for frames."""

    SEM = "sem"
    """A POSIX semaphore of each process."""
    POLL = "poll"
    """Sequence numbers read again and again with back-off: for runtimes without semaphores between processes."""
    SOCKET = "socket"
    """The socket of the zmq lane itself."""
