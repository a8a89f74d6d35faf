"""``steps``: where the time of one call goes, step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.call_steps import steps_of_a_call
from benchmarks.contenders import ours
from benchmarks.table import Table
from shmbroker.lane.ends import COMPILED

ROUNDS = 5
WARM_UP_CALLS = 100


def run(calls: int = 50_000) -> dict[str, Any]:
    """Measure each step alone in one process, best of five, and the whole call between two processes, median. Nanoseconds."""
    with steps_of_a_call() as step:
        taken, ran, completed = (_best_ns(one, calls) for one in (step.submit_and_take, step.and_run, step.and_complete))
        prepared, placed = _best_ns(step.prepare, calls), _best_ns(step.place, calls)
        made, finished = _best_ns(step.make, calls), _best_ns(step.and_finish, calls)
        step.leave_completion()
        waited = _best_ns(step.wait, calls)
    costs = {
        "client: find the input, look up the plan, make the call's record": prepared,
        "client: place the output and make its tensor; later let go of it": placed,
        "client: write and publish the frame; worker: copy and recognise it": taken,
        "worker: run an op that does nothing, count": ran - taken,
        "worker: write and publish the completion; client: read it": completed - ran,
        "client: wait (once it is there)": waited,
        "client: finish the call, count": finished - made,
    }
    with ours.calls(8 << 20) as own:
        call, replay = _median_ns(own["call"], calls), _median_ns(own["replay"], calls)
    table = Table(f"one call, {'compiled' if COMPILED else 'in Python'}", ["step", "ns"])
    for name, cost in costs.items():
        table.row(name, f"{cost:.0f}")
    table.row("sum of the steps", f"{sum(costs.values()):.0f}")
    table.row("the whole call between two processes, median", f"{call:.0f}")
    table.row("  replayed", f"{replay:.0f}")
    table.show()
    return {"compiled": COMPILED, "steps_ns": costs, "call_ns": call, "replay_ns": replay}


def quick() -> dict[str, Any]:
    """A thousand calls."""
    return run(1000)


def _best_ns(step: Callable[[], object], calls: int) -> float:
    """Nanoseconds of one, in the best of ``ROUNDS`` rounds."""
    for _ in range(WARM_UP_CALLS):
        step()
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter_ns()
        for _ in range(calls // ROUNDS):
            step()
        best = min(best, (time.perf_counter_ns() - begun) / (calls // ROUNDS))
    return best


def _median_ns(call: Callable[[], object], calls: int) -> float:
    samples = []
    for _ in range(calls):
        begun = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - begun)
    return statistics.median(samples)
