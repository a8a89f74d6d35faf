"""``cuda``: what a GPU does to the figures. Without one it says so and measures nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch

DEVICE = "cuda:0"
PREFILL_TOKENS = 512


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure, about ``seconds`` a case, medians. Without a GPU: the reason, and nothing else."""
    if reason := left_out():
        return reason
    from shmbroker.models import embedded

    return _measure(embedded.ensure(), PREFILL_TOKENS, seconds)


def quick() -> dict[str, Any]:
    """A moment of each, with a tiny model."""
    if reason := left_out():
        return reason
    from benchmarks.split_model.tiny import make_tiny

    with tempfile.TemporaryDirectory() as folder:
        return _measure(make_tiny(Path(folder)), 16, 0.1)


def left_out() -> dict[str, Any]:
    """Why nothing can be measured; empty where it can."""
    if torch.cuda.is_available():
        return {}
    reason = f"no CUDA device (torch {torch.__version__}): nothing is measured"
    click.echo(reason)
    return {"left_out": reason}


def _measure(model: Path, tokens: int, seconds: float) -> dict[str, Any]:
    from benchmarks.device.copies import copies
    from benchmarks.device.prefill import prefills
    from benchmarks.device.round_trips import round_trips

    return {
        "device": torch.cuda.get_device_name(0),
        "copies": copies(DEVICE, seconds / 4),
        "round_trips_us": round_trips(DEVICE, seconds),
        "prefill_ms": prefills(DEVICE, model, tokens, seconds / 2),
    }
