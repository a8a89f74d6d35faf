"""The two processes that a model is split over: the GPU worker, and this one with all cores."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import shmbroker
from shmbroker.client.local_broker import stop_process

START_SECONDS = 120.0
"""How long a GPU worker may take to load a model on a busy machine."""
CALL_SECONDS = 120.0


@contextlib.contextmanager
def on_all_cores(threads: int) -> Iterator[None]:
    """All cores and so many threads, whatever the other benchmarks have set."""
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def two_processes(model: Path, threads: int, arena: str) -> Iterator[shmbroker.Client]:
    """A client of a GPU worker with a model."""
    with gpu_worker(model, threads), shmbroker.connect(arena=arena, timeout=CALL_SECONDS) as client:
        yield client


@contextlib.contextmanager
def gpu_worker(model: Path, threads: int, *options: str) -> Iterator[None]:
    """A broker and a GPU worker with a model, so many threads there and here; further ``options`` of its command."""
    command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve"]
    command += ["--model", str(model), "--threads", str(threads), *options]
    with on_all_cores(threads), shmbroker.local_broker():
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            stop_process(worker)
