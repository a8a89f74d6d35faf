"""``steps``: where the time of one call goes: what calls between two processes tell of themselves, and each step of Python's calls alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.call_profile import STAGES, WAYS, WHOLE, Stages, profiles
from benchmarks.call_steps import steps_of_a_call
from benchmarks.contenders import core_floor, floors, ours
from benchmarks.measure import Case, alternate
from benchmarks.table import Table
from shmbroker.call.compiled_op import COMPILED as CALLS_COMPILED
from shmbroker.lane.ends import COMPILED

NBYTES = 8 << 20
ROUNDS = 5
WARM_UP_CALLS = 100
NS_A_CALL = 10_000
"""About: how long the calls of the last table are repeated, as a number of calls."""

BY_COMPILED_STEP = "the third to the fifth, with the worker's compiled step"
FLOORS = {"floor: spin on a word": "spin", "floor: the core in C": "core"}
"""With what they are in the head of a column."""

SPIN, CORE = FLOORS


def run(calls: int = 50_000) -> dict[str, Any]:
    """Measure what calls are made of, each step alone (in one process, best of five), and calls beside their floors. Nanoseconds."""
    stages, further, compiled = profiles(calls, NBYTES)
    _show_stages(stages, further, compiled, 2 * calls)
    steps = _steps(calls)
    _show_steps(steps)
    whole = _beside_the_floors(calls)
    return {
        "compiled": COMPILED,
        "calls_compiled": CALLS_COMPILED,
        "profile_ns": stages,
        "further_ns": further,
        "steps_ns": steps,
        **whole,
    }


def _show_stages(stages: dict[str, Stages], further: dict[str, float], compiled: int, calls: int) -> None:
    ways = list(WAYS)[: 4 if CALLS_COMPILED else 2]
    table = Table("what a call between two processes is made of, median ns", ["", *[WAYS[way] for way in ways]])
    for name in (*STAGES, WHOLE):
        table.row(name, *[f"{stages[way][name]:.0f}" for way in ways])
    for name, cost in further.items():
        table.row(f"  {name}", f"{cost:+.0f}")
    table.show()
    print(f"of {calls} calls and replays {compiled} were compiled" if CALLS_COMPILED else "there are no compiled calls here: all is Python")


def _steps(calls: int) -> dict[str, float]:
    with steps_of_a_call() as step:
        taken, ran, completed = (_best_ns(one, calls) for one in (step.submit_and_take, step.and_run, step.and_complete))
        prepared, placed = _best_ns(step.prepare, calls), _best_ns(step.place, calls)
        made, finished = _best_ns(step.make, calls), _best_ns(step.and_finish, calls)
        compiled = None if step.compiled_step is None else _best_ns(step.compiled_step, calls)
        step.leave_completion()
        waited = _best_ns(step.wait, calls)
    steps = {
        "client: find the input, look up the plan, make the call's record": prepared,
        "client: place the output and make its tensor; later let go of it": placed,
        "client: write and publish the frame; worker: copy and recognise it": taken,
        "worker: run an op that does nothing, count": ran - taken,
        "worker: write and publish the completion; client: read it": completed - ran,
        "client: wait (once it is there)": waited,
        "client: finish the call, count": finished - made,
    }
    return steps if compiled is None else {**steps, BY_COMPILED_STEP: compiled}


def _show_steps(steps: dict[str, float]) -> None:
    table = Table(f"the steps of a call by Python alone, {'ends compiled' if COMPILED else 'all in Python'}", ["step", "ns"])
    for name, cost in steps.items():
        if name != BY_COMPILED_STEP:
            table.row(name, f"{cost:.0f}")
    table.row("sum of the steps", f"{sum(cost for name, cost in steps.items() if name != BY_COMPILED_STEP):.0f}")
    if BY_COMPILED_STEP in steps:
        table.row(BY_COMPILED_STEP, f"{steps[BY_COMPILED_STEP]:.0f}")
    table.show()


def _beside_the_floors(calls: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(ours.calls(NBYTES))
        cases = [Case("call", own["call"]), Case("replayed", own["replay"]), Case(SPIN, stack.enter_context(floors.spin()))]
        why = core_floor.no_compiler()
        if why is None:
            cases.append(Case(CORE, stack.enter_context(core_floor.calls(NBYTES))))
        alternate(cases, calls * NS_A_CALL / 1e9)
    median = {case.name: case.median_us * 1e3 for case in cases}
    table = Table(
        "the whole call between two processes, median", ["", "ns", *[f"of the {head}" for name, head in FLOORS.items() if name in median]]
    )
    for name, cost in median.items():
        table.row(name, f"{cost:.0f}", *[f"{cost / median[floor]:.2f}" for floor in FLOORS if floor in median])
    table.show()
    if why is not None:
        print(f"left out: {CORE}: {why}")
    return {
        "call_ns": median["call"],
        "replay_ns": median["replayed"],
        "floors_ns": {name: median[name] for name in FLOORS if name in median},
    }


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
