"""``batching``: clients that decode on one worker, each by itself and computed together (``gpu-worker serve --batch``)."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import shmbroker
from benchmarks.peer import peer
from benchmarks.table import Table
from shmbroker.memory.reaper import objects
from shmbroker.monitoring.figures import read_figures

LAYERS = 2
TOKENS = 40
ROUNDS = 3
STEP_SECONDS = 1e-4
TOKEN_SECONDS = 5e-3
"""What a client takes itself before each call, and before each token: on a core of its own."""

CLIENTS = (1, 2, 4, 8)
_TICK = os.sysconf("SC_CLK_TCK")


def run(concurrency: tuple[int, ...] = CLIENTS, layers: int = LAYERS, tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure so many clients (``concurrency``) with and without batches, in turns: tokens a second of all, and the worker's processor time a token."""
    figures = {str(count): _measured(count, layers, tokens, rounds) for count in concurrency}
    table = Table(
        f"{layers} layers of 4 products, worker on one core, clients that decode",
        ["clients", "tokens/s alone", "together", "times", "worker CPU ms/token alone", "together", "part", "mean batch"],
    )
    for count, one in figures.items():
        alone, together = one["alone"], one["together"]
        table.row(
            count,
            f"{alone['tokens_per_second']:.1f}", f"{together['tokens_per_second']:.1f}", f"{one['speed']:.2f}",
            f"{alone['cpu_ms']:.2f}", f"{together['cpu_ms']:.2f}", f"{one['cpu_part']:.2f}", f"{together['mean_batch']:.1f}",
        )  # fmt: skip
    table.show()
    return figures


def quick() -> dict[str, Any]:
    """Two clients, a few tokens."""
    return run(concurrency=(2,), layers=1, tokens=4, rounds=1)


def _measured(clients: int, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {
        kind: {"tokens_per_second": [], "cpu_ms": [], "mean_batch": []} for kind in ("alone", "together")
    }
    for _ in range(rounds):
        for kind, figures in found.items():
            with contextlib.ExitStack() as stack:
                broker = stack.enter_context(shmbroker.local_broker())
                worker = stack.enter_context(peer("batching.worker", kind, str(layers)))
                others = [stack.enter_context(peer("batching.client", str(layers), str(number))) for number in range(clients)]
                _tokens(others, max(2, tokens // 4))
                before = _batched(broker.instance)
                cpu = _cpu_seconds(worker.pid)
                seconds = _tokens(others, tokens)
                used = _cpu_seconds(worker.pid) - cpu
                made = tokens * clients
                figures["tokens_per_second"].append(made / seconds)
                figures["cpu_ms"].append(used * 1e3 / made)
                calls, together = (now - then for now, then in zip(_batched(broker.instance), before, strict=True))
                figures["mean_batch"].append(together / calls if calls else 1.0)
    medians = {kind: {name: statistics.median(values) for name, values in figures.items()} for kind, figures in found.items()}
    return {
        **medians,
        "speed": medians["together"]["tokens_per_second"] / medians["alone"]["tokens_per_second"],
        "cpu_part": medians["together"]["cpu_ms"] / max(medians["alone"]["cpu_ms"], 1e-3),
    }


def _tokens(clients: list[subprocess.Popen[bytes]], count: int) -> float:
    """Have each make so many; the seconds that the slowest took."""
    for one in clients:
        assert one.stdin is not None
        one.stdin.write(f"{count} {STEP_SECONDS} {TOKEN_SECONDS}\n".encode())
        one.stdin.flush()
    return max([float(one.stdout.readline()) for one in clients if one.stdout is not None])


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _batched(instance: str) -> tuple[int, int]:
    """Calls, and all calls of the batches that each was in: one for a call that ran by itself."""
    time.sleep(0.3)  # both ends tell every 100 ms
    calls = batched = together = 0
    for name in objects(instance):
        if name.kind == "segment":
            for channel in read_figures(f"/{name.file}").channels:
                calls, batched, together = calls + channel.run_calls, batched + channel.batched_calls, together + channel.batched_with
    return calls, calls - batched + together
