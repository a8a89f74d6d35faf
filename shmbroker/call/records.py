"""Which records calls are kept and counted in: the compiled ones where they were built, whose numbers compiled calls write too; else those in Python."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from shmbroker.lane.ends import COMPILED

CALLS_COMPILED = COMPILED and find_spec("shmbroker.call._calls") is not None

if CALLS_COMPILED and not TYPE_CHECKING:
    from shmbroker.call._calls import CallRecord, Counters
else:
    from shmbroker.call.python_records import CallRecord, Counters

__all__ = ["CALLS_COMPILED", "CallRecord", "Counters"]
