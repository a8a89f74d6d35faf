"""``waiting``: what it costs to block instead of spinning, in time (beside a bare semaphore ping-pong) and in CPU."""

from __future__ import annotations

import time
from typing import Any

import shmbroker
from benchmarks.contenders import floors, ours
from benchmarks.machine import cpu_seconds
from benchmarks.measure import Case, alternate
from benchmarks.table import Table


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure with spin off. Microseconds; idle CPU in percent of one core."""
    with ours.calls(8 << 20, spin=0.0) as own, floors.semaphore() as floor:
        cases = [Case("call, no spin", own["call"]), Case("  replayed", own["replay"]), Case("semaphore ping-pong", floor)]
        alternate(cases, seconds)
    table = Table("blocking", ["", "median us", "p99 us", "of the floor"])
    bare = cases[-1].median_us
    for case in cases:
        table.row(case.name, f"{case.median_us:.1f}", f"{case.p99_us:.1f}", f"{case.median_us / bare:.2f}")
    table.show()
    with shmbroker.local_broker() as broker, ours.worker() as worker, shmbroker.connect(arena="1M") as client:
        client.channel("echo")
        idle = {}
        before = {name: cpu_seconds(pid) for name, pid in (("worker", worker.pid), ("broker", broker.pid))}
        begun = time.perf_counter()
        time.sleep(max(5 * seconds, 1.0))
        elapsed = time.perf_counter() - begun
        for name, pid in (("worker", worker.pid), ("broker", broker.pid)):
            idle[name] = 100 * (cpu_seconds(pid) - before[name]) / elapsed
    print(f"waiting costs: worker {idle['worker']:.2f} % of a CPU, broker {idle['broker']:.2f} %, over {elapsed:.0f} s")
    rows = {case.name.strip(): {"median_us": case.median_us, "p99_us": case.p99_us} for case in cases}
    return {**rows, "idle_percent": idle}


def quick() -> dict[str, Any]:
    """A moment of each, and a second of waiting."""
    return run(0.1)
