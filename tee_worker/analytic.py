"""The analytic model of a run beside what was counted."""

from __future__ import annotations

import msgspec

from shmbroker.client import Report
from tee_worker.planning.traffic import Traffic


class Analytic(msgspec.Struct, frozen=True):
    """The analytic model of the run, and whether what was counted equals it."""

    calls: int
    sent_bytes: int
    received_bytes: int
    equal: bool


def compare(expected: Traffic, report: Report) -> Analytic:
    """Equal means: calls of each op, and bytes each way."""
    counted = (report.total.calls, report.total.sent_bytes, report.total.received_bytes)
    told = (expected.calls, expected.sent_bytes, expected.received_bytes)
    by_op = {one.op: one.calls for one in report.ops}
    return Analytic(*told, equal=told == counted and by_op == expected.calls_by_op)
