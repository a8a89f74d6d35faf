"""``model``: a model split over two processes against the same model in one, and its prefill in parts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.split_model.pipeline import LENGTHS, pipelines
from benchmarks.split_model.splits import splits
from benchmarks.split_model.tiny import make_tiny
from benchmarks.split_model.work import Work
from shmbroker.models import embedded


def run(rounds: int = 5, threads: int = 2) -> dict[str, Any]:
    """Measure both with the embedded model, in seconds."""
    work = Work(embedded.ensure(), prefill_tokens=512, prompt_tokens=32, decode_tokens=32)
    return {"splits": splits(work, rounds, threads, "1G"), "pipelines": pipelines(work.model, max(1, rounds // 2), LENGTHS, "2G")}


def quick() -> dict[str, Any]:
    """A tiny model and a few tokens, once."""
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        work = Work(make_tiny(Path(folder)), prefill_tokens=16, prompt_tokens=4, decode_tokens=2)
        return {"splits": splits(work, 1, 1, "64M"), "pipelines": pipelines(work.model, 1, {16: (1, 2)}, "64M")}
