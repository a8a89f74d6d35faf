"""``alloc``: placing and releasing blocks, first-in-first-out, and with one block in eight held for long."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

import shmbroker
from benchmarks.measure import Call, Case, alternate
from benchmarks.table import Table
from shmbroker.arena.ring import Extent, RingAllocator

ARENA = 256 << 20
BLOCK = 1 << 20
QUEUE = 64


def _fifo(ring: RingAllocator) -> Callable[[], None]:
    blocks: deque[Extent] = deque()

    def step() -> None:
        if len(blocks) >= QUEUE:
            ring.release(blocks.popleft())
        block = ring.place(BLOCK)
        assert block is not None
        blocks.append(block)

    return step


def _with_some_held(ring: RingAllocator) -> Callable[[], None]:
    """One in eight is held eight times as long, and sizes differ."""
    random.seed(1)
    sizes = [random.randrange(BLOCK // 4, BLOCK) for _ in range(1024)]
    short: deque[Extent] = deque()
    held: deque[Extent] = deque()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if len(short) >= QUEUE:
            ring.release(short.popleft())
        if len(held) >= QUEUE:
            ring.release(held.popleft())
        block = ring.place(sizes[count % 1024])
        assert block is not None
        (held if count % 8 == 0 else short).append(block)

    return step


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure. Times in microseconds for one block placed and one released."""
    with shmbroker.local_broker(), shmbroker.connect(arena=ARENA) as client:
        cases = [
            Case("ring, first in first out", Call(_fifo(RingAllocator(0, ARENA)))),
            Case("ring, one in eight held", Call(_with_some_held(RingAllocator(0, ARENA)))),
            Case("client.empty, 1 MiB", Call(lambda: client.empty((BLOCK,), torch.uint8))),
            Case("torch.empty, 1 MiB", Call(lambda: torch.empty((BLOCK,), dtype=torch.uint8))),
        ]
        alternate(cases, seconds)
    table = Table("placing and releasing a block", ["", "median us", "p99 us"])
    for case in cases:
        table.row(case.name, f"{case.median_us:.2f}", f"{case.p99_us:.2f}")
    table.show()
    return {case.name: {"median_us": case.median_us, "p99_us": case.p99_us} for case in cases}


def quick() -> dict[str, Any]:
    """A moment."""
    return run(0.1)
