"""A soak: calls of random shapes, several clients and workers, views held and dropped at random. ``python -m tests.faults.soak [MINUTES] [SEED]``.

Memory, open files and latency of every process must stay flat: the last quarter is compared with the second (the first warms up).
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import shmbroker
from shmbroker.lane.ends import COMPILED
from shmbroker.memory.names import new_id
from tests.faults.world import SERVICE, Board, Process, World, wait_for, world

CLIENTS = (("shm", "sem"), ("shm", "poll"), ("zmq", "auto"))
WORKERS = 2
SAMPLES = 40
GROWTH = 1.05
"""More memory than so many times that of the second quarter is a leak."""

SLACK_BYTES = 4 << 20
DRIFT = 1.5
"""A shared machine's speed drifts; what leaks slows down without end."""

DTYPES = (torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.uint8)
KEPT = 12


def run_soaking_client(instance: str, seed: int, board: Board, lane: str, doorbell: str) -> None:
    """Call without end, with everything about the calls at random, and check every result."""
    choose = random.Random(seed)
    with shmbroker.connect(instance, arena="32M", depth=8) as client:
        channel = client.channel(SERVICE, lane=lane, doorbell=doorbell)
        affine = channel.bind("affine", out_spec=lambda x: x)
        kept: list[torch.Tensor] = []
        while True:
            shape = [choose.randrange(1, 17) for _ in range(choose.randrange(1, 5))]
            x = torch.randint(0, 30, shape).to(choose.choice(DTYPES))
            x = client.copy_in(x) if choose.random() < 0.6 else x
            if choose.random() < 0.3:
                x = x.transpose(0, -1)
            futures = [affine.submit(x) for _ in range(choose.randrange(1, 6))]
            for future in futures:
                with board.busy():
                    y = future.result()
                if not torch.equal(y, x * 3 + 7):
                    board.add("wrong")
                board.add("calls")
                if choose.random() < 0.2:
                    kept.append(y[choose.randrange(len(y)) :])  # a view keeps the block, for a while
            while len(kept) > choose.randrange(KEPT):
                kept.pop(choose.randrange(len(kept)))


@dataclass
class Record:
    """What was seen of one process over time."""

    process: Process
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    def sample(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.rss.append(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) << 10)
        self.files.append(len(os.listdir(f"/proc/{self.process.pid}/fd")))
        self.calls.append(self.process.board.get("calls"))


def quarter(values: list[int], number: int) -> list[int]:
    """The values of one quarter, counted from 0."""
    size = len(values) // 4
    return values[number * size : (number + 1) * size]


@contextlib.contextmanager
def soaking(here: World) -> Iterator[list[Record]]:
    """All processes, under load."""
    processes = [here.start("broker")] + [here.start("worker") for _ in range(WORKERS)]
    processes += [here.start("soaking client", lane, doorbell) for lane, doorbell in CLIENTS]
    if not wait_for(lambda: all(one.board.get("calls") > 100 for one in processes if "client" in one.role), 60.0):
        raise SystemExit(f"no load: {here.told()}")
    yield [Record(one) for one in processes]


def run(minutes: float, seed: int) -> int:
    """Soak for ``minutes``; returns 0 when all stayed flat."""
    bad: list[str] = []
    with world(f"soak-{os.getpid()}-{new_id()[:6]}") as here:
        here.seed = seed * 1000
        here.programs["soaking client"] = run_soaking_client
        with soaking(here) as records:
            for _ in range(SAMPLES):
                until = time.monotonic() + minutes * 60 / SAMPLES
                while time.monotonic() < until:
                    time.sleep(0.05)
                    dead = [one.process for one in records if one.process.ended()]
                    if dead:
                        print(f"{dead[0].role} ended, status {dead[0].status}: {dead[0].board.text}")
                        return 1
                for record in records:
                    record.sample()
            print(f"{minutes:g} minutes, seed {seed}, {'compiled' if COMPILED else 'pure Python'}; second quarter -> last quarter")
            for record in records:
                bad += _judge(record)
            wrong = sum(record.process.board.get("wrong") for record in records)
            print(f"{sum(record.calls[-1] for record in records)} calls, {wrong} with wrong bytes")
            if wrong:
                bad.append("wrong bytes")
    print("flat" if not bad else f"FAILED: {'; '.join(bad)}")
    return 1 if bad else 0


def _judge(record: Record) -> list[str]:
    role = f"{record.process.role} {record.process.pid}"
    before, after = (statistics.median(quarter(record.rss, number)) for number in (1, 3))
    files = statistics.median(quarter(record.files, 1)), statistics.median(quarter(record.files, 3))
    line = f"{role:22} memory {before / 2**20:6.1f} -> {after / 2**20:6.1f} MiB, open files {files[0]:.0f} -> {files[1]:.0f}"
    bad = []
    if after > before * GROWTH + SLACK_BYTES:
        bad.append(f"{role} grows")
    if files[1] > files[0] + 1:
        bad.append(f"{role} opens files")
    if record.calls[-1]:
        rates = [quarter(record.calls, number)[-1] - quarter(record.calls, number)[0] for number in (1, 3)]
        line += f", calls {rates[0]} -> {rates[1]}"
        if rates[0] > rates[1] * DRIFT:
            bad.append(f"{role} slows down")
    print(line)
    return bad


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
