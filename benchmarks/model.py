"""``model``: a model split over two processes against the same model in one, and its prefill in parts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.split_model.alone import alone
from benchmarks.split_model.pipeline import LENGTHS, pipelines
from benchmarks.split_model.processes import two_processes
from benchmarks.split_model.splits import show, splits
from benchmarks.split_model.tiny import make_tiny
from benchmarks.split_model.work import Times, Work
from shmbroker.models import embedded


def run(rounds: int = 5, threads: int = 2) -> dict[str, Any]:
    """Measure both with the embedded model, in seconds."""
    work = Work(embedded.ensure(), prefill_tokens=512, prompt_tokens=32, decode_tokens=32)
    before = alone(work, threads)
    with two_processes(work.model, threads, "1G") as client:
        medians = splits(client, work, rounds)
    after = alone(work, threads)  # again: the machine's speed may have changed meanwhile
    best = Times(min(before.prefill, after.prefill), min(before.decode, after.decode))
    with two_processes(work.model, 1, "2G") as client:
        rows = pipelines(client, work.model, max(1, rounds // 2), LENGTHS)
    return {"splits": show(work, threads, medians, best), "pipelines": rows}


def quick() -> dict[str, Any]:
    """A tiny model and a few tokens, once."""
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        work = Work(make_tiny(Path(folder)), prefill_tokens=16, prompt_tokens=4, decode_tokens=2)
        by_itself = alone(work, 1)
        with two_processes(work.model, 1, "64M") as client:
            medians, rows = splits(client, work, 1), pipelines(client, work.model, 1, {16: (1, 2)})
        return {"splits": show(work, 1, medians, by_itself), "pipelines": rows}
