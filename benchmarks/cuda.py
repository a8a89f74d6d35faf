"""``cuda``: what a GPU does to the figures. Without one it says so and measures nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

if TYPE_CHECKING:
    from benchmarks.split_model.work import Work

DEVICE = "cuda:0"


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure, about ``seconds`` a case, medians. Without a GPU: the reason, and nothing else."""
    if reason := left_out():
        return reason
    from benchmarks.split_model.work import Work
    from shmbroker.models import embedded

    return _measure(Work(embedded.ensure(), prefill_tokens=512, prompt_tokens=32, decode_tokens=32), seconds)


def quick() -> dict[str, Any]:
    """A moment of each, with a tiny model."""
    if reason := left_out():
        return reason
    from benchmarks.split_model.tiny import make_tiny
    from benchmarks.split_model.work import Work

    with tempfile.TemporaryDirectory() as folder:
        return _measure(Work(make_tiny(Path(folder)), prefill_tokens=16, prompt_tokens=4, decode_tokens=4), 0.1)


def left_out() -> dict[str, Any]:
    """Why nothing can be measured; empty where it can."""
    if torch.cuda.is_available():
        return {}
    reason = f"no CUDA device (torch {torch.__version__}): nothing is measured"
    click.echo(reason)
    return {"left_out": reason}


def _measure(work: Work, seconds: float) -> dict[str, Any]:
    from benchmarks.device.copies import copies
    from benchmarks.device.model import model_times
    from benchmarks.device.round_trips import round_trips

    return {
        "device": torch.cuda.get_device_name(0),
        "copies": copies(DEVICE, seconds / 4),
        "round_trips_us": round_trips(DEVICE, seconds),
        "model_ms": model_times(DEVICE, work, seconds / 2),
    }
