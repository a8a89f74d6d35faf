"""``rtt``: round trip by tensor size, lanes and doorbells, against everything else that can be had."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from benchmarks.contenders import floors, missing, ours, shared_memory, torch_queue
from benchmarks.measure import Case, alternate
from benchmarks.table import Table, size_text

SIZES = [64, 4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20]
OURS = "shmbroker shm/sem"
MSGPACK = "msgpack over ZeroMQ"
OPTIONAL = (("iceoryx2", "iceoryx2", "iceoryx"), (MSGPACK, "msgpack", "msgpack_socket"), ("ray", "ray", "ray_actor"))
"""Contenders that need a package which need not be there: name, package, file."""


def cases_for(nbytes: int, stack: contextlib.ExitStack, notes: dict[str, str]) -> list[Case]:
    """All contenders at one size."""
    enter = stack.enter_context
    own = enter(ours.calls(nbytes))
    cases = [
        Case(OURS, own["call"]),
        Case("  replayed", own["replay"]),
        Case("  input outside the arena", own["copied in"]),
        Case("shmbroker shm/poll", enter(ours.calls(nbytes, doorbell="poll"))["call"]),
        Case("shmbroker shm/sem, no spin", enter(ours.calls(nbytes, spin=0.0))["call"]),
        Case("shmbroker zmq", enter(ours.calls(nbytes, lane="zmq"))["call"]),
        Case("shared_memory + Pipe", enter(shared_memory.calls(nbytes))),
    ]
    queues = enter(torch_queue.calls(nbytes))
    cases += [Case("torch queue, reused tensor", queues["reused"]), Case("torch queue, new tensor", queues["new"])]
    for name, package, file in OPTIONAL:
        why = missing(package)
        if why is None:
            cases.append(Case(name, enter(importlib.import_module(f"benchmarks.contenders.{file}").calls(nbytes))))
        else:
            notes[name] = why
    return cases


def floors_for(stack: contextlib.ExitStack) -> list[Case]:
    """What no Python program can be below."""
    enter = stack.enter_context
    return [
        Case("floor: spin on a word", enter(floors.spin())),
        Case("floor: semaphore", enter(floors.semaphore())),
        Case("floor: eventfd", enter(floors.eventfd())),
    ]


def run(seconds: float = 2.0, sizes: list[int] | None = None) -> dict[str, Any]:
    """Measure at each size; all contenders alternate in one run. Times in microseconds."""
    result: dict[str, Any] = {"sizes": {}, "left_out": {}}
    for nbytes in sizes or SIZES:
        with contextlib.ExitStack() as stack:
            cases = [*cases_for(nbytes, stack, result["left_out"]), *floors_for(stack)]
            alternate(cases, seconds)
        rows = {case.name.strip(): {"median_us": case.median_us, "p99_us": case.p99_us} for case in cases}
        result["sizes"][str(nbytes)] = rows
        own = rows[OURS]["median_us"]
        table = Table(f"round trip, {size_text(nbytes)} to a peer and {size_text(nbytes)} back", ["", "median us", "p99 us", "ours / it"])
        for case in cases:
            table.row(case.name, f"{case.median_us:.1f}", f"{case.p99_us:.1f}", f"{own / case.median_us:.3f}")
        table.show()
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    print(copying_wins(result["sizes"]))
    return result


def quick() -> dict[str, Any]:
    """A moment, at one size."""
    return run(0.1, [1 << 20])


def copying_wins(sizes: dict[str, Any]) -> str:
    """The size below which sending bytes over a socket is faster than handing memory over."""
    won = [int(size) for size, rows in sizes.items() if rows.get(MSGPACK, {}).get("median_us", 1e9) < rows[OURS]["median_us"]]
    if not any(MSGPACK in rows for rows in sizes.values()):
        return "whether copying wins anywhere was not measured: msgpack is not installed"
    if won:
        return f"copying over a socket wins up to {size_text(max(won))}"
    return f"copying over a socket wins at no size measured, from {size_text(int(min(sizes, key=int)))} on"
