"""``rtt``: round trip by tensor size, lanes and doorbells, against everything else that can be had."""

from __future__ import annotations

import contextlib
from typing import Any

from benchmarks import contenders
from benchmarks.measure import Case, alternate, size_text
from benchmarks.table import Table

SIZES = [64, 4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20]
OURS = "shmbroker shm/sem"


def cases_for(nbytes: int, stack: contextlib.ExitStack, notes: dict[str, str]) -> list[Case]:
    """All contenders at one size."""
    enter = stack.enter_context
    ours = enter(contenders.shmbroker_calls(nbytes))
    cases = [
        Case(OURS, ours["call"]),
        Case("  replayed", ours["replay"]),
        Case("  input outside the arena", ours["copied in"]),
        Case("shmbroker shm/poll", enter(contenders.shmbroker_calls(nbytes, doorbell="poll"))["call"]),
        Case("shmbroker shm/sem, no spin", enter(contenders.shmbroker_calls(nbytes, spin=0.0))["call"]),
        Case("shmbroker zmq", enter(contenders.shmbroker_calls(nbytes, lane="zmq"))["call"]),
        Case("shared_memory + Pipe", enter(contenders.shared_memory_calls(nbytes))),
    ]
    queues = enter(contenders.torch_queue_calls(nbytes))
    cases += [Case("torch queue, reused tensor", queues["reused"]), Case("torch queue, new tensor", queues["new"])]
    for name, package, calls in (
        ("iceoryx2", "iceoryx2", contenders.iceoryx2_calls),
        ("msgpack over ZeroMQ", "msgpack", contenders.msgpack_calls),
        ("ray", "ray", contenders.ray_calls),
    ):
        why = contenders.missing(package)
        if why is None:
            cases.append(Case(name, enter(calls(nbytes))))
        else:
            notes[name] = why
    return cases


def floors(stack: contextlib.ExitStack) -> list[Case]:
    """What no Python program can be below."""
    enter = stack.enter_context
    return [
        Case("floor: spin on a word", enter(contenders.spin_calls())),
        Case("floor: semaphore", enter(contenders.semaphore_calls())),
        Case("floor: eventfd", enter(contenders.eventfd_calls())),
    ]


def run(seconds: float = 2.0, sizes: list[int] | None = None) -> dict[str, Any]:
    """Measure at each size; all contenders alternate in one run. Times in microseconds."""
    result: dict[str, Any] = {"sizes": {}, "left_out": {}}
    for nbytes in sizes or SIZES:
        with contextlib.ExitStack() as stack:
            cases = [*cases_for(nbytes, stack, result["left_out"]), *floors(stack)]
            alternate(cases, seconds)
        rows = {case.name.strip(): {"median_us": case.median_us, "p99_us": case.p99_us} for case in cases}
        result["sizes"][str(nbytes)] = rows
        ours = rows[OURS]["median_us"]
        table = Table(f"round trip, {contenders.describe(nbytes)}", ["", "median us", "p99 us", "ours / it"])
        for case in cases:
            table.row(case.name, f"{case.median_us:.1f}", f"{case.p99_us:.1f}", f"{ours / case.median_us:.3f}")
        table.show()
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    print(copying_wins(result["sizes"]))
    return result


def copying_wins(sizes: dict[str, Any]) -> str:
    """The size below which sending bytes over a socket is faster than handing memory over."""
    won = [int(size) for size, rows in sizes.items() if rows.get("msgpack over ZeroMQ", {}).get("median_us", 1e9) < rows[OURS]["median_us"]]
    if not any("msgpack over ZeroMQ" in rows for rows in sizes.values()):
        return "whether copying wins anywhere was not measured: msgpack is not installed"
    if won:
        return f"copying over a socket wins up to {size_text(max(won))}"
    return f"copying over a socket wins at no size measured, from {size_text(int(min(sizes, key=int)))} on"
