"""``throughput``: calls a second by calls in flight and by clients, each with the CPU time that it costs."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

import shmbroker
from benchmarks.contenders import ours
from benchmarks.machine import cpu_seconds
from benchmarks.peer import peer, ready
from benchmarks.table import Table, size_text

IN_FLIGHT = (1, 8, 32)
SIZES = (4 << 10, 1 << 20)
CLIENTS = (1, 2, 4)


def _pump(client: shmbroker.Client, nbytes: int, in_flight: int, seconds: float) -> int:
    op = client.channel("echo").bind("echo", out_spec=lambda x: x)
    x = client.empty((nbytes,), torch.uint8).fill_(1)
    count = 0
    until = time.perf_counter() + seconds
    if in_flight == 1:  # called and waited for, as most programs do
        while time.perf_counter() < until:
            op(x)
            count += 1
        return count
    waiting = deque(op.submit(x) for _ in range(in_flight))
    while time.perf_counter() < until:
        waiting.popleft().result()
        waiting.append(op.submit(x))
        count += 1
    for future in waiting:
        future.result()
    return count


def run(seconds: float = 2.0, in_flights: Sequence[int] = IN_FLIGHT, several: Sequence[int] = CLIENTS) -> dict[str, Any]:
    """Measure, by calls in flight of one client, then by clients with one call each. ``GiB/s`` counts inputs and outputs."""
    rows: list[dict[str, Any]] = []
    with shmbroker.local_broker(), ours.worker() as worker:
        for nbytes in SIZES:
            for in_flight in in_flights:
                with shmbroker.connect(arena=256 << 20) as client:
                    _pump(client, nbytes, in_flight, min(0.2, seconds))
                    before = cpu_seconds(worker.pid), resource.getrusage(resource.RUSAGE_SELF)
                    count = _pump(client, nbytes, in_flight, seconds)
                    after = cpu_seconds(worker.pid), resource.getrusage(resource.RUSAGE_SELF)
                own = sum(getattr(after[1], field) - getattr(before[1], field) for field in ("ru_utime", "ru_stime"))
                rows.append(_row(nbytes, in_flight, 1, count, seconds, own, after[0] - before[0]))
        for clients in several:
            before_cpu = cpu_seconds(worker.pid)
            counts = _several(clients, SIZES[0], seconds)
            rows.append(_row(SIZES[0], 1, clients, sum(counts), seconds, None, cpu_seconds(worker.pid) - before_cpu))
    table = Table("throughput", ["size", "in flight", "clients", "calls/s", "GiB/s", "client CPU us/call", "worker CPU us/call"])
    for row in rows:
        client_cpu = "" if row["client_cpu_us"] is None else f"{row['client_cpu_us']:.1f}"
        table.row(
            size_text(row["nbytes"]), str(row["in_flight"]), str(row["clients"]), f"{row['calls_per_second']:,.0f}",
            f"{row['gib_per_second']:.1f}", client_cpu, f"{row['worker_cpu_us']:.1f}",
        )  # fmt: skip
    table.show()
    return {"rows": rows}


def quick() -> dict[str, Any]:
    """A moment of each, and one number of clients."""
    return run(0.1, IN_FLIGHT[:2], CLIENTS[1:2])


def _row(
    nbytes: int, in_flight: int, clients: int, count: int, seconds: float, client_cpu: float | None, worker_cpu: float
) -> dict[str, Any]:
    """``client_cpu``: None where it was not measured."""
    return {
        "nbytes": nbytes,
        "in_flight": in_flight,
        "clients": clients,
        "calls_per_second": count / seconds,
        "gib_per_second": 2 * nbytes * count / seconds / 2**30,
        "client_cpu_us": None if client_cpu is None else client_cpu / max(count, 1) * 1e6,
        "worker_cpu_us": worker_cpu / max(count, 1) * 1e6,
    }


def _several(clients: int, nbytes: int, seconds: float) -> list[int]:
    """Calls that each of several client processes got through at the same time."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(peer("throughput", str(nbytes), str(seconds))) for _ in range(clients)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]


def _one_of_several(nbytes: str, seconds: str) -> None:
    """In a process of its own: connect, await the word, call, tell how often."""
    with shmbroker.connect(arena=64 << 20) as client:
        ready()
        sys.stdin.readline()
        print(json.dumps(_pump(client, int(nbytes), 1, float(seconds))), flush=True)


if __name__ == "__main__":
    _one_of_several(*sys.argv[1:])
