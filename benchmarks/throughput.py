"""``throughput``: calls a second with several in flight, several clients on one worker, and what a call costs in CPU time."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

import shmbroker
from benchmarks.contenders import ROOT, peer
from benchmarks.measure import size_text
from benchmarks.table import Table
from shmbroker.client.local_broker import stop_process

IN_FLIGHT = (1, 8, 32)
SIZES = (4 << 10, 1 << 20)
CLIENTS = (1, 2, 4)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _pump(client: shmbroker.Client, nbytes: int, in_flight: int, seconds: float) -> int:
    op = client.channel("echo").bind("echo", out_spec=lambda x: x)
    x = client.empty((nbytes,), torch.uint8).fill_(1)
    waiting = deque(op.submit(x) for _ in range(in_flight))
    count = 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        waiting.popleft().result()
        waiting.append(op.submit(x))
        count += 1
    for future in waiting:
        future.result()
    return count


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure. ``GiB/s`` counts inputs and outputs."""
    rows: list[dict[str, Any]] = []
    with shmbroker.local_broker(), peer("shmbroker", "50e-6") as worker:
        for nbytes in SIZES:
            for in_flight in IN_FLIGHT:
                with shmbroker.connect(arena=256 << 20) as client:
                    _pump(client, nbytes, in_flight, min(0.2, seconds))
                    before = _cpu_seconds(worker.pid), resource.getrusage(resource.RUSAGE_SELF)
                    count = _pump(client, nbytes, in_flight, seconds)
                    after = _cpu_seconds(worker.pid), resource.getrusage(resource.RUSAGE_SELF)
                own = sum(getattr(after[1], field) - getattr(before[1], field) for field in ("ru_utime", "ru_stime"))
                rows.append(_row(nbytes, in_flight, 1, count, seconds, own, after[0] - before[0]))
        for clients in CLIENTS:
            before_cpu = _cpu_seconds(worker.pid)
            counts = _several(clients, SIZES[0], seconds)
            rows.append(_row(SIZES[0], 1, clients, sum(counts), seconds, float("nan"), _cpu_seconds(worker.pid) - before_cpu))
    table = Table("throughput", ["size", "in flight", "clients", "calls/s", "GiB/s", "client CPU us/call", "worker CPU us/call"])
    for row in rows:
        own = "" if row["client_cpu_us"] != row["client_cpu_us"] else f"{row['client_cpu_us']:.1f}"
        table.row(
            size_text(row["nbytes"]), str(row["in_flight"]), str(row["clients"]), f"{row['calls_per_second']:,.0f}",
            f"{row['gib_per_second']:.1f}", own, f"{row['worker_cpu_us']:.1f}",
        )  # fmt: skip
    table.show()
    return {"rows": rows}


def _row(nbytes: int, in_flight: int, clients: int, count: int, seconds: float, client_cpu: float, worker_cpu: float) -> dict[str, Any]:
    return {
        "nbytes": nbytes,
        "in_flight": in_flight,
        "clients": clients,
        "calls_per_second": count / seconds,
        "gib_per_second": 2 * nbytes * count / seconds / 2**30,
        "client_cpu_us": client_cpu / max(count, 1) * 1e6,
        "worker_cpu_us": worker_cpu / max(count, 1) * 1e6,
    }


def _several(clients: int, nbytes: int, seconds: float) -> list[int]:
    """Calls that each of several client processes got through at the same time."""
    command = [sys.executable, "-m", "benchmarks.throughput", str(nbytes), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(clients):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            stack.callback(stop_process, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # connected
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.close()
        return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]


if __name__ == "__main__":
    with shmbroker.connect(arena=64 << 20) as one:
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(_pump(one, int(sys.argv[1]), 1, float(sys.argv[2]))), flush=True)
