"""Chaos: processes are killed at random under load, for as long as asked. ``python -m tests.faults.chaos [SECONDS] [SEED]``.

What must hold is told in :mod:`tests.faults.matrix` (K1..K5). Here the compiled parts are in use, where there are any, and every lane and doorbell.
"""

from __future__ import annotations

import os
import random
import sys
import time

from shmbroker.lane.ends import COMPILED
from shmbroker.memory.names import new_id
from tests.faults.world import PATIENCE, Process, World, wait_for, world

HANG_SECONDS = 1.0 * PATIENCE
"""K1: who waits for longer counts as hanging."""

LEAK_SECONDS = 2.0 * PATIENCE
"""K4, counted while a broker lives."""

START_SECONDS = 30.0 * PATIENCE
SETTLE_SECONDS = 15.0 * PATIENCE

CAST = [
    ("broker", "", ""),
    ("worker", "", ""),
    ("worker", "", ""),
    ("client", "shm", "sem"),
    ("client", "shm", "poll"),
    ("client", "zmq", "auto"),
]


class Observer:
    """Looks at all clients and at shared memory, all the time."""

    def __init__(self, here: World) -> None:
        self._here = here
        self._unheld_since: dict[str, float] = {}
        self._hanging: set[tuple[int, int]] = set()
        self.leaks: set[str] = set()
        self.longest_wait = 0.0

    @property
    def hangs(self) -> int:
        return len(self._hanging)

    @property
    def waits_for_reaping(self) -> bool:
        """Something of the dead is still there, and is no leak yet."""
        return bool(self._unheld_since.keys() - self.leaks)

    def look(self, broker: Process) -> None:
        for client in self._here.clients():
            waited = client.board.busy_seconds()
            self.longest_wait = max(self.longest_wait, waited)
            if waited > HANG_SECONDS:
                self._hanging.add((client.pid, client.board.get("busy_since_ns")))
        now = time.monotonic()
        unheld = self._here.unheld()
        if broker.ended():
            self._unheld_since.clear()  # nobody is there to reap
        self._unheld_since = {name: self._unheld_since.get(name, now) for name in unheld}
        self.leaks |= {name for name, since in self._unheld_since.items() if now - since > LEAK_SECONDS}


def run(seconds: float, seed: int) -> int:
    """Kill for ``seconds``; returns 0 when all held."""
    choose = random.Random(seed)
    kills = {"broker": 0, "worker": 0, "client": 0}
    with world(f"chaos-{os.getpid()}-{new_id()[:6]}") as here:
        here.seed = seed * 1000
        cast = [here.start(role, lane, doorbell) for role, lane, doorbell in CAST]
        ready = wait_for(lambda: all(one.board.get("calls") > 10 for one in here.clients()), START_SECONDS)
        observer = Observer(here)
        until = time.monotonic() + seconds
        while ready and time.monotonic() < until:
            index = choose.randrange(len(cast))
            role, lane, doorbell = CAST[index]
            cast[index].kill()
            cast[index].wait(5.0)
            kills[role] += 1
            _watch_for(choose.random() * 0.3, observer, cast)
            cast[index] = here.start(role, lane, doorbell)
            _watch_for(choose.random() * 0.5, observer, cast)
        before = {one.pid: one.board.get("calls") for one in here.clients()}
        went_on = ready and wait_for(lambda: all(one.board.get("calls") > before[one.pid] + 100 for one in here.clients()), SETTLE_SECONDS)
        _watch_for(0.0, observer, cast)
        while observer.waits_for_reaping:
            _watch_for(0.005, observer, cast)
        totals = {word: sum(one.board.get(word) for one in here.processes) for word in ("calls", "errors", "lost", "wrong", "unexpected")}
        texts = {one.board.text for one in here.processes if one.board.get("unexpected")}
        died_alone = [one for one in here.processes if one.ended() and one.status not in (9, None)]
    print(
        f"{sum(kills.values())} kills ({', '.join(f'{count} {role}' for role, count in kills.items())}) in {seconds:g} s, seed {seed}, "
        f"{'compiled' if COMPILED else 'pure Python'}"
    )
    print(
        f"{totals['calls']} calls, {totals['lost']} told of a lost worker, {totals['errors']} other errors while a peer was away; "
        f"longest wait {observer.longest_wait:.3f} s"
    )
    print(
        f"wrong bytes {totals['wrong']}, hangs {observer.hangs}, leaked objects {len(observer.leaks)}, unexpected errors {totals['unexpected']}"
    )
    for text in texts:
        print(text)
    for one in died_alone:
        print(f"{one.role} {one.pid} ended by itself, status {one.status}: {one.board.text}")
    bad = totals["wrong"] or observer.hangs or observer.leaks or totals["unexpected"] or died_alone or not went_on
    if not went_on:
        print("not everyone went on in the end" if ready else "not everyone came to life")
    print("all held" if not bad else "FAILED")
    return 1 if bad else 0


def _watch_for(seconds: float, observer: Observer, cast: list[Process]) -> None:
    until = time.monotonic() + seconds
    while True:
        observer.look(cast[0])
        if time.monotonic() >= until:
            return
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
