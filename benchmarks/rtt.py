"""``rtt``: round trip by tensor size, lanes and doorbells, against everything else that can be had."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from benchmarks.contenders import core_floor, floors, missing, ours, shared_memory, torch_queue
from benchmarks.measure import Case, alternate
from benchmarks.table import Table, size_text

SIZES = [64, 4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20]
OURS = "shmbroker shm/sem"
MSGPACK = "msgpack over ZeroMQ"
REPLAYED = "  replayed"
NO_SPIN = "shmbroker shm/sem, no spin"
ICEORYX = "iceoryx2"
SPIN, SEMAPHORE, CORE = "floor: spin on a word", "floor: semaphore", "floor: the core in C"
ZENOH = "zenoh shared memory"
RAY = {"objects": "Ray, put and an actor's method", "graph": "Ray, compiled graph"}

TARGETS = (
    ("a call, of iceoryx2's", OURS, ICEORYX, 0.25),
    ("a call, of the spin floor", OURS, SPIN, 6.0),
    ("replayed, of the spin floor", REPLAYED, SPIN, 3.0),
    ("with spin off, of the bare semaphore", NO_SPIN, SEMAPHORE, 1.15),
)
"""What is wanted: our row's time as a multiple of another's of the same run, and how large it is to be at most."""


def cases_for(nbytes: int, stack: contextlib.ExitStack, notes: dict[str, str]) -> list[Case]:
    """The contenders at one size that take turns; ``notes`` tells which are left out."""
    enter = stack.enter_context
    own = enter(ours.calls(nbytes))
    cases = [
        Case(OURS, own["call"]),
        Case(REPLAYED, own["replay"]),
        Case("  input outside the arena", own["copied in"]),
        Case("shmbroker shm/poll", enter(ours.calls(nbytes, doorbell="poll"))["call"]),
        Case(NO_SPIN, enter(ours.calls(nbytes, spin=0.0))["call"]),
        Case("shmbroker zmq", enter(ours.calls(nbytes, lane="zmq"))["call"]),
        Case("shared_memory + Pipe", enter(shared_memory.calls(nbytes))),
    ]
    queues = enter(torch_queue.calls(nbytes))
    cases += [Case("torch queue, reused tensor", queues["reused"]), Case("torch queue, new tensor", queues["new"])]
    for name, package, file in ((ICEORYX, "iceoryx2", "iceoryx"), (MSGPACK, "msgpack", "msgpack_socket")):
        if there := module_of(name, package, file, notes):
            cases.append(Case(name, enter(there.calls(nbytes))))
    if there := module_of(ZENOH, "zenoh", "zenoh_shm", notes):
        zenoh = enter(there.calls(nbytes))
        cases += [Case(f"{ZENOH}, buffers alone", zenoh["buffers"]), Case(f"{ZENOH}, tensors", zenoh["tensors"])]
    return cases


def floors_for(nbytes: int, stack: contextlib.ExitStack, notes: dict[str, str]) -> list[Case]:
    """What no Python program can be below, and what the core itself takes."""
    enter = stack.enter_context
    cases = [Case(SPIN, enter(floors.spin())), Case(SEMAPHORE, enter(floors.semaphore())), Case("floor: eventfd", enter(floors.eventfd()))]
    if why := core_floor.no_compiler():
        notes[CORE] = why
    else:
        cases.append(Case(CORE, enter(core_floor.calls(nbytes))))
    return cases


def after_the_others(nbytes: int, seconds: float, notes: dict[str, str]) -> list[Case]:
    """Contenders that never rest, each alone: their daemons would have the others' cores."""
    cases = []
    if there := module_of("Ray", "ray", "ray_objects", notes):
        for way, name in RAY.items():
            with there.calls(nbytes, way) as call:
                cases.append(Case(name, call))
                alternate(cases[-1:], seconds)
    return cases


def module_of(name: str, package: str, file: str, notes: dict[str, str]) -> Any:
    """That of a contender that needs a package; None, and a note, where it is not there."""
    if why := missing(package):
        notes[name] = why
        return None
    return importlib.import_module(f"benchmarks.contenders.{file}")


def run(seconds: float = 2.0, sizes: list[int] | None = None) -> dict[str, Any]:
    """Measure at each size; the contenders alternate in one run, but for those that never rest, which come after. Times in microseconds."""
    result: dict[str, Any] = {"sizes": {}, "left_out": {}}
    for nbytes in sizes or SIZES:
        with contextlib.ExitStack() as stack:
            cases = [*cases_for(nbytes, stack, result["left_out"]), *floors_for(nbytes, stack, result["left_out"])]
            alternate(cases, seconds)
        cases += after_the_others(nbytes, seconds, result["left_out"])
        result["sizes"][str(nbytes)] = {case.name.strip(): {"median_us": case.median_us, "p99_us": case.p99_us} for case in cases}
        show(nbytes, {case.name: case for case in cases})
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    print(copying_wins(result["sizes"]))
    return result


def show(nbytes: int, cases: dict[str, Case]) -> None:
    """The table of one size, and what is wanted of it."""
    own, replayed = cases[OURS].median_us, cases[REPLAYED].median_us
    title = f"round trip, {size_text(nbytes)} to a peer and {size_text(nbytes)} back"
    table = Table(title, ["", "median us", "p99 us", "ours / it", "replayed / it"])
    for case in cases.values():
        median = case.median_us
        table.row(
            case.name, f"{median:.{1 if median > 10 else 2}f}", f"{case.p99_us:.1f}", *[_ratio(one / median) for one in (own, replayed)]
        )
    table.show()
    for name, one, other, most in TARGETS:
        if other in cases:
            print(f"{name}: {cases[one].median_us / cases[other].median_us:.2f} (wanted: {most:g} at most)")


def _ratio(ratio: float) -> str:
    """Of a contender that is thousands of times slower, too, a figure and not 0.000."""
    return f"{ratio:.3f}" if ratio >= 0.01 else f"{ratio:.2g}"


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
