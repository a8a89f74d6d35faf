"""What a worker counts of a channel, in Python; ``_steps.c`` has the same as plain words."""

from __future__ import annotations


class Counters:
    """What a channel has done; times in nanoseconds."""

    __slots__ = ("batched", "batched_with", "calls", "compute_ns", "errors", "queued_ns")

    batched: int
    batched_with: int
    calls: int
    compute_ns: int
    errors: int
    queued_ns: int
