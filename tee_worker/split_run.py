"""What every run of a split model needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shmbroker.call.report import Report
from shmbroker.errors import ArenaTooSmall
from shmbroker.memory.layout import PAGE, round_up
from shmbroker.settings.sizes import MIB, parse_bytes
from tee_worker.planning.traffic import Traffic

if TYPE_CHECKING:
    pass


ARENA_FLOOR = 64 * MIB


ARENA_LARGEST_TENSORS = 4
"""The arena that is asked for when none is told: room for so many tensors of the largest size of the run, on top of the floor. Attention has
scores, keys, values and a result at once."""


class Analytic(msgspec.Struct, frozen=True):
    """The analytic model of the run, and whether what was counted equals it."""

    calls: int
    sent_bytes: int
    received_bytes: int
    equal: bool


def arena_bytes(told: str | None, planned: Traffic, pipeline: int = 1) -> int:
    """Size of the arena: as told, if the run's largest tensor fits in it; else enough for the run. Raises :class:`ArenaTooSmall`."""
    assert planned.largest is not None
    assert planned.largest_tensor is not None
    largest = planned.largest_tensor.nbytes
    if told is None:
        return round_up(ARENA_FLOOR + ARENA_LARGEST_TENSORS * pipeline * largest, PAGE)
    size = parse_bytes(told)
    if size < largest:
        raise ArenaTooSmall(
            f"--arena {told} is {size} bytes; the largest tensor of this run, {planned.largest_tensor} of op {planned.largest.op!r}, takes "
            f"{largest} bytes: give --arena at least {round_up(ARENA_LARGEST_TENSORS * largest, MIB) // MIB}M (room for "
            f"{ARENA_LARGEST_TENSORS} of them), or leave it out"
        )
    return size


def compare(expected: Traffic, report: Report) -> Analytic:
    """The analytic model beside what was counted."""
    counted = (report.total.calls, report.total.sent_bytes, report.total.received_bytes)
    told = (expected.calls, expected.sent_bytes, expected.received_bytes)
    by_op = {line.op: line.calls for line in report.ops}
    return Analytic(*told, equal=told == counted and by_op == expected.calls_by_op)


def private_bytes() -> int:
    """Resident memory of this process that it shares with nobody."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
