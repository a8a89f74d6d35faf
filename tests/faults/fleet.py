"""Kills replicas of a fleet and their GPU workers at random, under load: ``python -m tests.faults.fleet KILLS SEED``.

Of every request there is an answer, the right one, or an error object that says what happened; and at the end nothing is left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cycling_model import CONTEXT, expected, save_cycling
from tests.fleet import Fleet, end_of, running_fleet, stream
from tests.processes import wait_until

GREEDY, SAMPLED = 4, 1
"""Clients that ask without pause."""

TOKENS = 150


def kill_at_random(fleet: Fleet, kills: int, seed: int) -> Counter[str]:
    """So many, of either. How requests ended, and who was killed; raises what is wrong with an answer."""
    choice = random.Random(seed)
    over = threading.Event()
    outcomes: Counter[str] = Counter()

    def greedy(number: int) -> None:
        letter = chr(ord("A") + number)
        while not over.is_set():
            text, error = end_of(stream(fleet, letter, TOKENS))
            assert error or text == expected(letter, TOKENS)
            outcomes["error" if error else "answer"] += 1

    def sampled() -> None:
        while not over.is_set():
            text, error = end_of(stream(fleet, "s", TOKENS // 2, temperature=1.0))
            assert error or text
            outcomes["sampled, error" if error else "sampled, answer"] += 1

    with ThreadPoolExecutor(GREEDY + SAMPLED) as pool:
        asking = [pool.submit(greedy, number) for number in range(GREEDY)] + [pool.submit(sampled) for _ in range(SAMPLED)]

        def enough(count: int) -> bool:
            return outcomes.total() >= count or any(one.done() for one in asking)

        try:
            for _ in range(kills):
                wait_until(lambda: bool(fleet.whole()) or any(one.done() for one in asking))
                replica, worker = choice.choice(sorted(fleet.whole().values()) or [(0, 0)])
                role = choice.choice(["replica", "GPU worker"])
                if replica:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(replica if role == "replica" else worker, signal.SIGKILL)
                        outcomes[f"killed: {role}"] += 1
                wait_until(functools.partial(enough, outcomes.total() + 1 + choice.randrange(4)))
        finally:
            over.set()
        for one in asking:
            one.result()
    print(f"seed {seed}: {dict(outcomes)}")
    return outcomes


def main() -> None:
    """A fleet of its own."""
    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="shmbroker-") as folder:
        model = save_cycling(Path(folder) / "cycling")
        begun = time.monotonic()
        with running_fleet(model, "--local-nodes", "2", "--replicas", "2", "--max-context", str(CONTEXT)) as fleet:
            outcomes = kill_at_random(fleet, kills, seed)
            fleet.end()
            wait_until(lambda: not fleet.processes())
            left = fleet.left()
    print(f"{kills} kills in {time.monotonic() - begun:.0f} s; left behind: {left or 'nothing'}")
    sys.exit(bool(left) or outcomes["error"] > outcomes["answer"])


if __name__ == "__main__":
    main()
