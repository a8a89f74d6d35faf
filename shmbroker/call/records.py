"""Which records calls are kept and counted in: the compiled ones where they were built, whose numbers compiled calls write too; else those in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmbroker.lane.ends import COMPILED

CALLS_COMPILED = False
"""Whether the records are the compiled ones."""

if COMPILED:
    try:
        from shmbroker.arena import _leases  # noqa: F401 (what compiled calls need too)
        from shmbroker.call import _calls  # noqa: F401
    except ImportError:
        pass
    else:
        CALLS_COMPILED = True

if CALLS_COMPILED and not TYPE_CHECKING:
    from shmbroker.call._calls import CallRecord, Counters
else:
    from shmbroker.call.python_records import CallRecord, Counters

__all__ = ["CALLS_COMPILED", "CallRecord", "Counters"]
