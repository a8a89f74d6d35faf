"""``ray``: what the way through Ray adds to a request: time to the first token, processor time for a token, and what a cluster takes when idle.

The same model behind ``tee-worker serve --local`` and behind ``tee-worker ray`` with one replica on a cluster of one node, both there all the time,
measured in turns: greedy streams of one client, real HTTP.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import requests

from benchmarks.split_model.processes import on_all_cores
from benchmarks.split_model.tiny import make_tiny
from benchmarks.table import Table
from benchmarks.tiny_tokenizer import save_tokenizer
from shmbroker.client.local_broker import stop_process
from shmbroker.models import embedded

DIRECT = "tee-worker serve"
THROUGH_RAY = "tee-worker ray"

TICKS = os.sysconf("SC_CLK_TCK")
IDLE_SECONDS = 10.0
END_SECONDS = 120.0
"""For a cluster to end."""
RUNTIME = "SHMBROKER_RUNTIME_DIR"
MARK = "MEASURED_AS"
"""A variable that all processes of a contender inherit."""

SERVING = ("tee_worker", "gpu_worker", "ray::ServeReplica", "ray::ProxyActor")
"""In the command lines of processes that a token goes through."""


@dataclass
class Contender:
    """A server, and what was measured of it."""

    url: str
    runtime: str
    first_token: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """For a token, of all processes that it goes through."""

    def processes(self) -> dict[int, str]:
        """All of its own."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and f"{MARK}={self.runtime}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def cpu_seconds(self, *, serving: bool) -> float:
        """Of those that a token goes through, or of all others."""
        return sum(_cpu(pid) for pid, command in self.processes().items() if any(word in command for word in SERVING) == serving)

    def resident_mib(self, *, serving: bool) -> float:
        """What they have in memory."""
        pages = 0
        for pid, command in self.processes().items():
            with contextlib.suppress(OSError):
                if any(word in command for word in SERVING) == serving:
                    pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def ask(self, prompt: str, tokens: int, *, count: bool) -> None:
        """One greedy stream."""
        cpu, begun, first, seen = self.cpu_seconds(serving=True), time.perf_counter(), 0.0, 0
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": {"0": -100}}
        with requests.post(f"{self.url}/completions", json=body, stream=True, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - begun
                    seen += 1
        if count:
            self.first_token.append(first)
            self.cpu_ms.append((self.cpu_seconds(serving=True) - cpu) * 1e3 / max(1, seen))


def _cpu(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0


def run() -> dict[str, Any]:
    """With the embedded model, some minutes."""
    return measure(embedded.ensure(), tokens=48, rounds=10, idle_seconds=IDLE_SECONDS)


def quick() -> dict[str, Any]:
    """A tiny model and a few tokens, once."""
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        model = make_tiny(Path(folder) / "tiny")
        save_tokenizer(model)
        return measure(model, tokens=4, rounds=1, idle_seconds=0.1)


def measure(model: Path, tokens: int, rounds: int, idle_seconds: float) -> dict[str, Any]:
    """Print the table; the figures."""
    if importlib.util.find_spec("ray") is None:
        click.echo("the extra is not installed: pip install 'shmbroker[ray]'")
        return {}
    common = ["--model", str(model), "--port", "0", "--threads", "1", "--max-context", "512"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_all_cores(1))
        servers = {
            DIRECT: stack.enter_context(_server("serve", "--local", *common)),
            THROUGH_RAY: stack.enter_context(_server("ray", "--local-nodes", "1", "--replicas", "1", *common)),
        }
        for turn in range(rounds + 1):
            for server in servers.values():
                server.ask(f"Once upon a time {turn}", tokens, count=turn > 0)
        fleet = servers[THROUGH_RAY]
        idle = {serving: fleet.cpu_seconds(serving=serving) for serving in (True, False)}
        time.sleep(idle_seconds)
        cores = sum(fleet.cpu_seconds(serving=serving) - before for serving, before in idle.items()) / idle_seconds
        daemons = fleet.resident_mib(serving=False)
    table = Table(
        f"{model.name}, float32, split fused, {tokens} tokens of answer, one client, one thread on either side",
        ["", "first token ms", "CPU ms a token"],
    )
    figures: dict[str, Any] = {}
    for name, server in servers.items():
        first, cpu = 1e3 * statistics.median(server.first_token), statistics.median(server.cpu_ms)
        table.row(name, f"{first:.1f}", f"{cpu:.1f}")
        figures[name] = {"first_token_ms": first, "cpu_ms": cpu}
    table.show()
    added = figures[THROUGH_RAY]["first_token_ms"] - figures[DIRECT]["first_token_ms"]
    ratio = figures[THROUGH_RAY]["cpu_ms"] / max(figures[DIRECT]["cpu_ms"], 1e-9)
    click.echo(f"through Ray: {added:+.1f} ms to the first token, {ratio:.3f} of the processor time a token")
    click.echo(f"idle, the whole fleet of one node takes {cores:.2f} of a core; Ray's daemons have {daemons:.0f} MiB resident")
    return {**figures, "added_first_token_ms": added, "cpu_ratio": ratio, "idle_percent": 100 * cores, "daemons_mib": daemons}


@contextlib.contextmanager
def _server(command: str, *options: str) -> Iterator[Contender]:
    with tempfile.TemporaryDirectory(prefix="shmbroker-") as runtime:
        process = subprocess.Popen(
            [sys.executable, "-m", "tee_worker", command, *options],
            env={**os.environ, RUNTIME: runtime, MARK: runtime},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline().decode()
            if not line.startswith("ready: "):
                raise RuntimeError(f"tee-worker {command} did not start")
            yield Contender(line.split()[1], runtime)
        finally:
            stop_process(process, END_SECONDS)
