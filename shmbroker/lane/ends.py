"""Which ends of the queues are used: the compiled ones where they were built, else those in Python.

Both speak the same layout, so the two sides of a channel need not agree.
"""

from __future__ import annotations

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
    from shmbroker.lane._ends import CompletionReceiver, CompletionSender, SubmissionReceiver, SubmissionSender, spin
else:
    from shmbroker.lane.python_ends import CompletionReceiver, CompletionSender, SubmissionReceiver, SubmissionSender, spin

__all__ = ["COMPILED", "CompletionReceiver", "CompletionSender", "SubmissionReceiver", "SubmissionSender", "spin"]
