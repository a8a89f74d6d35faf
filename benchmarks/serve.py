"""``serve``: the endpoint with one request and with several at once, beside one at a time and beside Hugging Face's own server in one process.

Every contender is a server process with an OpenAI client's threads before it: real HTTP, streams, greedy, the same prompts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import requests

from benchmarks.split_model.processes import gpu_worker, on_all_cores
from benchmarks.split_model.tiny import make_tiny
from benchmarks.table import Table
from benchmarks.tiny_tokenizer import save_tokenizer
from shmbroker.client.local_broker import stop_process
from shmbroker.models import embedded

TOGETHER = "8 at once"
ONE_BY_ONE = "one by one"
LIBRARY = "transformers"

START_SECONDS = 300.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """What is asked for: so many requests for each client, each with so many tokens of prompt and answer."""

    model: Path
    prompt_tokens: int
    new_tokens: int
    requests: int
    rounds: int


@dataclass
class Measured:
    """Of one contender under one concurrency."""

    tokens_per_second: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """Of the server's own process, for a token."""


@dataclass(frozen=True)
class Server:
    """A contender that answers."""

    url: str
    name: str
    pid: int

    def cpu_seconds(self) -> float:
        """User and system, of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def run(concurrency: Sequence[int] = (1, 4, 8), threads: int = 1) -> dict[str, Any]:
    """With the embedded model, minutes."""
    return measure(Load(embedded.ensure(), prompt_tokens=32, new_tokens=48, requests=1, rounds=3), concurrency, threads)


def quick() -> dict[str, Any]:
    """A tiny model and a few tokens, once."""
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        model = make_tiny(Path(folder) / "tiny")
        save_tokenizer(model)
        return measure(Load(model, prompt_tokens=4, new_tokens=4, requests=1, rounds=1), (1, 2), 1)


def measure(load: Load, concurrency: Sequence[int], threads: int) -> dict[str, Any]:
    """Print the table; the figures. All contenders are there at once and measured in turns."""
    found: dict[tuple[str, int], Measured] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_all_cores(threads))
        stack.enter_context(gpu_worker(load.model, threads))
        servers = {
            TOGETHER: stack.enter_context(_ours(load.model, threads, 8)),
            ONE_BY_ONE: stack.enter_context(_ours(load.model, threads, 1)),
            LIBRARY: stack.enter_context(_library(load.model, threads)),
        }
        for turn in range(load.rounds + 1):
            for clients in concurrency:
                for name, server in servers.items():
                    _ask(server, load, clients, found.setdefault((name, clients), Measured()) if turn else Measured())
    table = Table(
        f"{load.model.name}, float32, split fused, {load.prompt_tokens} tokens of prompt, {load.new_tokens} of answer, {threads} threads in each process; CPU of the serving process, for a token",
        ["clients", "tokens/s", "/one by one", "/transformers", "first s", "/one by one", "CPU ms"],
    )
    figures: dict[str, Any] = {}
    for clients in concurrency:
        rows = {name: found[name, clients] for name in servers}
        speed = {name: statistics.median(row.tokens_per_second) for name, row in rows.items()}
        first = {name: statistics.median(row.first_token) for name, row in rows.items()}
        for name, row in rows.items():
            cpu = statistics.median(row.cpu_ms)
            table.row(
                f"{clients}, {name}", f"{speed[name]:.1f}", f"{speed[name] / speed[ONE_BY_ONE]:.2f}", f"{speed[name] / speed[LIBRARY]:.2f}",
                f"{first[name]:.3f}", f"{first[name] / first[ONE_BY_ONE]:.2f}", f"{cpu:.1f}",
            )  # fmt: skip
            figures[f"{clients} {name}"] = {
                "tokens_per_second": speed[name],
                "first_token_seconds": first[name],
                "server_cpu_us": cpu * 1e3,
            }
    table.show()
    return figures


def _ask(server: Server, load: Load, clients: int, into: Measured) -> None:
    """So many clients at once."""

    def one(number: int) -> tuple[int, list[float]]:
        client = openai.OpenAI(base_url=server.url, api_key="none", timeout=600, max_retries=0)
        tokens, firsts = 0, []
        for turn in range(load.requests):
            prompt = " ".join(f"{number}{turn}" for _ in range(load.prompt_tokens // 2))
            begun = time.perf_counter()
            seen = 0
            for chunk in client.completions.create(
                model=server.name, prompt=prompt, max_tokens=load.new_tokens, temperature=0, stream=True
            ):
                if chunk.choices and chunk.choices[0].text and not seen:
                    firsts.append(time.perf_counter() - begun)
                seen += bool(chunk.choices and chunk.choices[0].text)
            tokens += seen
        return tokens, firsts

    begun, cpu = time.perf_counter(), server.cpu_seconds()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, range(clients)))
    seconds, tokens = time.perf_counter() - begun, sum(count for count, _ in answers)
    into.tokens_per_second.append(tokens / seconds)
    into.first_token.extend(first for _, firsts in answers for first in firsts)
    into.cpu_ms.append((server.cpu_seconds() - cpu) * 1e3 / max(1, tokens))


@contextlib.contextmanager
def _ours(model: Path, threads: int, at_once: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "tee_worker", "serve", "--model", str(model), "--port", "0", "--threads", str(threads)]
    command += ["--max-context", "512", "--max-concurrency", str(at_once), "--served-model-name", "model"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("ready: "):
            raise RuntimeError("tee-worker serve did not start")
        yield Server(line.split()[1], "model", process.pid)
    finally:
        stop_process(process)


@contextlib.contextmanager
def _library(model: Path, threads: int) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--continuous-batching"]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=60).ok:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("transformers serve did not start")
            time.sleep(0.1)
        yield Server(f"http://127.0.0.1:{port}/v1", str(model), process.pid)
    finally:
        stop_process(process)
