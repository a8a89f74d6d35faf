"""What a client counts of its calls: per op, cheap enough for every call, and read by the report."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from shmbroker.call.records import Counters
from shmbroker.memory.layout import BUCKETS, FIRST_BUCKET

SAMPLES = 1 << 16
"""Calls whose times are kept for the percentiles, per op: the last ones."""


DOUBLED_BITS = 2 * 64 + 1
"""How many values ``(t * t).bit_length()`` may have for a time of 64 bits."""


def no_calls() -> list[int]:
    """A histogram of call times, empty. A call of t nanoseconds is counted by ``histogram[(t * t).bit_length()] += 1``.

    So there are two buckets for each doubling, no bounds to check, and no logarithm to take.
    """
    return [0] * DOUBLED_BITS


def published(histogram: list[int]) -> list[int]:
    """The histogram as the segment's header has it: what is beyond its ends is counted at its ends."""
    last = FIRST_BUCKET + BUCKETS - 1
    return [sum(histogram[: FIRST_BUCKET + 1]), *histogram[FIRST_BUCKET + 1 : last], sum(histogram[last:])]


class TrustCounts(NamedTuple):
    """What a client does about results that it does not believe. The mode is empty where it has not said."""

    mode: str
    checked: int = 0
    """Rows whose results were checked."""
    rejected: int = 0
    pads_taken: int = 0
    """Rows that were masked."""
    pads_waited: int = 0
    """Of them, those that waited for a pad."""

    def __str__(self) -> str:
        pads = f", {self.pads_taken} pads taken, {self.pads_waited} waited for" if self.pads_taken else ""
        return f"{self.mode}: {self.checked} rows checked, {self.rejected} rejected{pads}" if self.mode else ""


def nothing_told() -> TrustCounts:
    """Of a channel whose client has not said."""
    return TrustCounts("")


class OpStatistics(Counters):
    """Counters of one bound op. Times in nanoseconds, sizes in bytes. Written by whoever completes a call, read at any time."""

    __slots__ = ("name", "samples")

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.calls: int = 0
        self.errors: int = 0
        self.rpc_ns: int = 0
        """From the call until its outputs are in the caller's hands."""
        self.compute_ns: int = 0
        """Of it, the op on the worker."""
        self.queued_ns: int = 0
        """Of it, from the frame's writing until the worker took it."""
        self.copy_ns: int = 0
        """Of it, copying inputs that did not lie in the arena."""
        self.build_ns: int = 0
        """Of it, placing outputs, building and publishing the frame."""
        self.read_ns: int = 0
        """Of it, reading the completion."""
        self.sent_bytes: int = 0
        """Inputs, handed over through shared memory."""
        self.received_bytes: int = 0
        """Outputs, the same way."""
        self.copied_bytes: int = 0
        self.samples: deque[int] = deque(maxlen=SAMPLES)
