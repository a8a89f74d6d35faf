"""What is kept of a call, and what calls are counted by, in Python; ``_records.c`` has the same with plain words for numbers."""

from __future__ import annotations

from typing import Any


class CallRecord:
    """What is kept of a call while it is outstanding; times in nanoseconds of CLOCK_MONOTONIC."""

    __slots__ = (
        "back",
        "begun_ns",
        "call_id",
        "copied_bytes",
        "copy_ns",
        "deadline_ns",
        "error",
        "future",
        "holds",
        "inputs",
        "outputs",
        "plan",
        "state",
        "submitted_ns",
        "wake",
    )

    back: Any
    begun_ns: int
    call_id: int
    copied_bytes: int
    copy_ns: int
    deadline_ns: int
    error: Any
    future: Any
    holds: Any
    inputs: Any
    outputs: Any
    plan: Any
    state: Any
    submitted_ns: int
    wake: Any


class Counters:
    """Counters of one bound op. Times in nanoseconds, sizes in bytes."""

    __slots__ = (
        "build_ns",
        "calls",
        "compute_ns",
        "copied_bytes",
        "copy_ns",
        "errors",
        "queued_ns",
        "read_ns",
        "received_bytes",
        "rpc_ns",
        "sent_bytes",
    )

    build_ns: int
    calls: int
    compute_ns: int
    copied_bytes: int
    copy_ns: int
    errors: int
    queued_ns: int
    read_ns: int
    received_bytes: int
    rpc_ns: int
    sent_bytes: int
