"""The kill matrix: each role is killed at each step of the protocol that it passes, under load. ``python -m tests.faults.matrix [ROLE:POINT ...]``;
``--short`` for a few, ``--list`` to see all.

What must hold then, for those that live on:

K1  No caller waits for longer than a second: it has its correct result, or an error that names the peer it lost.
K2  No tensor has wrong bytes.
K3  Everyone works on, with a peer that was started anew in place of the dead one.
K4  Two seconds later nothing of the dead lies in shared memory.
K5  No error that is no news of that death.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tests.faults import points

if "shmbroker.lane" not in sys.modules:
    os.environ["SHMBROKER_PURE_PYTHON"] = "1"  # the points are lines of Python
    points.install()

from shmbroker.memory.names import new_id
from tests.faults.world import PATIENCE, RESULT_HALF_WRITTEN, Process, World, wait_for, world

ROLES: dict[str, dict[str, int]] = {
    "broker": {
        "before segment made": 2, "after segment made": 2, "before header published": 2, "after header published": 2,
        "before segment unlinked": 0, "after segment unlinked": 0,
    },
    "worker": {
        "before bell held": 0, "after bell held": 0,
        "before channel opened": 2, "after channel opened": 2, "before frame taken": 90, "after frame taken": 70, "before op running": 60,
        "amid result written": 50, "after result written": 60, "before completion written": 60, "amid completion written": 60,
        "after completion written": 60, "after publishing": 60, "before doorbell rung": 20, "amid doorbell rung": 20, "after doorbell rung": 20,
        "before segment unlinked": -1, "after segment unlinked": -1,
    },
    "client": {
        "before segment held": 1, "after segment held": 1,
        "before channel opened": 1, "after channel opened": 1, "before block placed": 40, "after block placed": 40, "before frame written": 30,
        "amid frame written": 30, "after frame written": 30, "after publishing": 30, "before doorbell rung": 8, "amid doorbell rung": 8,
        "after doorbell rung": 8, "before completion taken": 30, "after completion taken": 30, "before block freed": 10, "after block freed": 10,
        "before segment unlinked": 1, "after segment unlinked": 1,
    },
}  # fmt: skip
"""Points by the role that passes them, with how often they are passed before; -1: the process is told to stop, and dies on its way out."""

SHORT = [
    "broker:after segment made", "broker:before segment unlinked", "worker:after frame taken", "worker:amid result written",
    "worker:amid completion written", "worker:amid doorbell rung", "client:amid frame written", "client:after publishing",
    "client:before completion taken", "client:before segment unlinked",
]  # fmt: skip
"""Those that ``make test`` runs: one for each thing that can be half done."""

REACH_SECONDS = 30.0 * PATIENCE
TOLD_SECONDS = 1.0 * PATIENCE
REAPED_SECONDS = 2.0 * PATIENCE
RECOVER_SECONDS = 15.0 * PATIENCE
CALLS_AFTERWARDS = 50


class Failed(Exception):
    """Something that must hold did not."""


def check(condition: bool, text: str) -> None:
    if not condition:
        raise Failed(text)


def run_case(role: str, point: str, passes: int, seed: int = 0) -> str:
    """One cell of the matrix; returns a few words on how it went. Raises :class:`Failed`."""
    with world(f"faults-{os.getpid()}-{new_id()[:6]}") as here:
        here.seed = seed
        doorbell = "sem" if "doorbell" in point or seed % 2 == 0 else "poll"
        faults = {role: (point, max(passes, 0))}

        def start(which: str, faulty: bool = False) -> Process:
            fault, count = faults[which] if faulty else ("", 0)
            return here.start(which, "shm", doorbell, fault, count)

        victims = {which: start(which, faulty=which == role) for which in ("broker", "worker", "client")}
        others = [start("client") for _ in range(2)]
        victim = victims[role]
        if passes < 0:
            check(wait_for(lambda: all(one.board.get("calls") > 100 for one in others), REACH_SECONDS), "no load")
            victim.kill(signal.SIGTERM)
        if role == "broker" and "unlinked" in point:
            check(wait_for(lambda: victims["client"].board.get("calls") > 0, REACH_SECONDS), "no load")
            victims["client"].kill()  # who leaves in good order tidies up itself: the broker unlinks what the dead leave
        check(victim.wait(REACH_SECONDS), f"{role} never came to {point!r}; {here.told()}")
        check(victim.status == signal.SIGKILL, f"{role} ended by itself, status {victim.status}: {victim.board.text}")
        died = time.monotonic()
        left = here.unheld()
        slowest = _watch_callers(here, died)
        if role != "client":
            start(role)
        else:
            others.append(start("client"))
        if role == "broker":
            check(wait_for(lambda: not left & here.unheld(), REAPED_SECONDS + 1.0), f"left in shared memory: {left & here.unheld()}")
        else:
            rest = max(0.1, died + REAPED_SECONDS - time.monotonic())
            check(
                wait_for(lambda: not left & here.unheld(), rest),
                f"left in shared memory after {REAPED_SECONDS:g} s: {left & here.unheld()}",
            )
        before = {one.pid: one.board.get("calls") for one in here.clients()}
        check(
            wait_for(lambda: all(one.board.get("calls") >= before[one.pid] + CALLS_AFTERWARDS for one in here.clients()), RECOVER_SECONDS),
            f"no calls after {role} was started again; {here.told()}",
        )
        recovered = time.monotonic() - died
        for one in here.processes:
            check(one.board.get("wrong") == 0, f"{one.board.get('wrong')} results had wrong bytes")
            check(one.board.get("unexpected") == 0, f"an error that is no news of the death: {one.board.text}")
        calls = sum(one.board.get("calls") for one in here.processes)
        lost = sum(one.board.get("lost") for one in here.processes)
        return f"{calls:6} calls, {lost} told of the loss, longest wait {slowest:.3f} s, all well after {recovered:.1f} s"


def _watch_callers(here: World, died: float) -> float:
    """K1, for as long as it may take."""
    slowest = 0.0
    while time.monotonic() < died + TOLD_SECONDS + 0.2:
        for one in here.clients():
            slowest = max(slowest, one.board.busy_seconds())
        check(slowest < TOLD_SECONDS, f"a caller has waited for {slowest:.1f} s since")
        if time.monotonic() > died + 0.4 and all(one.board.busy_seconds() < 0.2 for one in here.clients()):
            break  # whoever waited when it died has been told
        time.sleep(0.005)
    return slowest


def mismatches() -> list[str]:
    """Points of the package that no case is for, and cases whose point is not in the package."""
    there = {*points.all_points(), RESULT_HALF_WRITTEN}
    killed_at = {point for named in ROLES.values() for point in named}
    return [f"no case kills anybody at {point!r}" for point in sorted(there - killed_at)] + [
        f"{point!r} is nowhere in the package" for point in sorted(killed_at - there)
    ]


def main() -> int:
    """Run the cells that are named, or all."""
    wanted = sys.argv[1:]
    if wanted == ["--short"]:
        wanted = SHORT
    cases = {f"{role}:{point}": (role, point, passes) for role, named in ROLES.items() for point, passes in named.items()}
    if wanted == ["--list"]:
        print("\n".join(cases))
        return 0
    unknown = set(wanted) - set(cases)
    if unknown:
        print(f"there is no {', '.join(sorted(unknown))}; --list shows all")
        return 2
    failures = 0
    for text in mismatches():
        print(f"FAILED  {text}")
        failures += 1
    passed = 0
    for number, (case, (role, point, passes)) in enumerate(cases.items()):
        if wanted and case not in wanted:
            continue
        try:
            outcome = "ok      " + run_case(role, point, passes, seed=1000 * number)
            passed += 1
        except Failed as failure:
            outcome = f"FAILED  {failure}"
            failures += 1
        print(f"{role:7} {point:26} {outcome}", flush=True)
    print(f"{passed} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
