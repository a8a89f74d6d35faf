"""The names of lanes and doorbells, as they stand in settings, command lines, messages and reports."""

from __future__ import annotations

import enum
from typing import Literal, get_args


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


AUTO = "auto"
"""The best one that both ends can use."""

LaneWord = Literal["auto", "shm", "zmq"]
"""The lane that a user asks for; ``auto``: the best one that both ends can use."""

DoorbellWord = Literal["auto", "sem", "poll"]
"""The doorbell that a user asks for, on lane shm; ``auto``: the best one there."""

TrustWord = Literal["plain", "verify", "shares", "blind"]
"""The modes of trust in a GPU worker, from the least that is kept from it to the most."""

TRUST_WORDS: tuple[TrustWord, ...] = get_args(TrustWord)

LANE_WORDS: tuple[LaneWord, ...] = get_args(LaneWord)
"""For messages and choices."""

DOORBELL_WORDS: tuple[DoorbellWord, ...] = get_args(DoorbellWord)


def listed(words: tuple[str, ...]) -> str:
    """``auto, shm or zmq``: the words as a sentence has them."""
    return f"{', '.join(words[:-1])} or {words[-1]}"
