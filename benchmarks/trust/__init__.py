"""``trust``: what the trust modes cost, how near their numbers are to plain's, and whether they ever cry wolf."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.families.tiny import tiny_family
from benchmarks.split_model.tiny import make_tiny
from benchmarks.split_model.work import Work
from benchmarks.trust.accuracy import accuracy
from benchmarks.trust.alarms import alarms
from benchmarks.trust.loops import loops
from benchmarks.trust.speed import speed
from shmbroker.models import embedded

ROWS = 1_000_000
"""Of each kind, for false alarms."""


def run(rounds: int = 7, threads: int = 1) -> dict[str, Any]:
    """With the embedded model, minutes."""
    model = embedded.ensure()
    figures: dict[str, Any] = {"loops": loops(rows=256, rounds=20)}
    figures["speed"] = speed(Work(model, prefill_tokens=256, prompt_tokens=16, decode_tokens=32), rounds, threads)
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        figures["accuracy"] = [
            accuracy("embedded model", model, prompts=8, tokens=75, same=128),
            accuracy("tiny qwen3, random", tiny_family(Path(folder) / "qwen3", "qwen3"), prompts=8, tokens=75, same=64),
        ]
    figures["alarms"] = alarms(ROWS)
    return figures


def quick() -> dict[str, Any]:
    """A tiny model and a few tokens, once."""
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        model = make_tiny(Path(folder) / "tiny")
        return {
            "loops": loops(rows=8, rounds=1),
            "speed": speed(Work(model, prefill_tokens=8, prompt_tokens=4, decode_tokens=2), 1, 1),
            "accuracy": [accuracy("tiny", model, prompts=2, tokens=4, same=4)],
            "alarms": alarms(1000),
        }
