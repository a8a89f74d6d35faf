"""Which ends of the queues are used: the compiled ones where they were built, else those in Python.

Both speak the same layout, so the two sides of a channel need not agree. The compiled ones say of each step in which order others see it, on whatever
processor; those in Python lean on x86-64, where plain stores are seen in the order of the program.
"""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING

from shmbroker.memory import compiled
from shmbroker.memory.layout import LAYOUT_VERSION

COMPILED = False
"""Whether the ends used here are the compiled ones."""

if compiled.WANTED:
    try:
        from shmbroker.lane import _ends

        # One that was built from another release's sources would write another layout.
        COMPILED = _ends.LAYOUT_VERSION == LAYOUT_VERSION
    except ImportError:
        pass

if COMPILED and not TYPE_CHECKING:
    from shmbroker.lane._ends import (
        CompletionReceiver,
        CompletionSender,
        SubmissionReceiver,
        SubmissionSender,
        after_sleep,
        before_sleep,
        fence,
        spin,
    )
else:
    from shmbroker.lane.doorbell import fence
    from shmbroker.lane.python_ends import (
        CompletionReceiver,
        CompletionSender,
        SubmissionReceiver,
        SubmissionSender,
        after_sleep,
        before_sleep,
        spin,
    )

__all__ = [
    "COMPILED",
    "CompletionReceiver",
    "CompletionSender",
    "SubmissionReceiver",
    "SubmissionSender",
    "after_sleep",
    "before_sleep",
    "fence",
    "shm_lane_needs",
    "spin",
]

_STORES_IN_ORDER = ("x86_64", "AMD64")
"""As :func:`platform.machine` says it."""


def shm_lane_needs() -> str:
    """What lane shm needs and this process has not, in words for its user; empty where it can be used."""
    if sys.byteorder != "little":
        return f"a little-endian processor, as the layout of a segment is; {platform.machine()} is none"
    if COMPILED or platform.machine() in _STORES_IN_ORDER:
        return ""
    return f"the compiled parts on {platform.machine()}: plain stores from Python are seen in order on x86-64 only"
