"""What a split model does, held against the whole one in one process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.families.behaviours import BEHAVIOURS, EAGER, Behaviour
from benchmarks.families.tiny import whole_model
from shmbroker import Client, ShmBrokerError
from tee_worker import Split, offload

TOLERANCE = 1e-4
"""Of the largest value: longer sums in another order."""

EQUAL = "equal"


@dataclass(frozen=True, slots=True)
class Expected:
    """What came in one process: a value, or the kind of error."""

    value: Any
    error: str | None = None


def expected_of(model: PreTrainedModel, run: Behaviour) -> Expected:
    """What a whole model does."""
    with torch.random.fork_rng():
        try:
            return Expected(run(model))
        except Exception as error:
            return Expected(None, type(error).__name__)


def outcome(model: PreTrainedModel, run: Behaviour, expected: Expected) -> str:
    """What a split model does, held against it: equal, the words of the refusal, or what is wrong."""
    with torch.random.fork_rng():
        try:
            found = run(model)
        except ShmBrokerError as error:
            return f"refused: {error}"
        except Exception as error:
            if expected.error == type(error).__name__:
                return EQUAL
            return f"{type(error).__name__}: {error}"
    if expected.error is not None:
        return f"runs, and in one process it is a {expected.error}"
    return EQUAL if _same(found, expected.value) else "another number"


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            return bool(torch.equal(found, expected))
        scale = float(expected.abs().max()) or 1.0
        return float((found - expected).abs().max()) <= TOLERANCE * scale
    if isinstance(expected, tuple):
        return isinstance(found, tuple) and len(found) == len(expected) and all(_same(*pair) for pair in zip(found, expected, strict=True))
    return bool(found == expected)


def compare(client: Client, service: str, folder: Path, split: Split, names: Iterable[str] = tuple(BEHAVIOURS)) -> dict[str, str]:
    """By behaviour: equal, the words of the refusal, or what is wrong. ``service``: a worker with the model of ``folder``."""
    found: dict[str, str] = {}
    for options in ({}, {"attn_implementation": "eager"}):
        these = [name for name in names if (name in EAGER) is bool(options)]
        if not these:
            continue
        expected = {name: expected_of(whole_model(folder, **options), BEHAVIOURS[name]) for name in these}
        model = whole_model(folder, **options)
        channel = client.channel(service)
        try:
            offload(model, channel, split)
            for name in these:
                found[name] = outcome(model, BEHAVIOURS[name], expected[name])
        finally:
            channel.close()
    return {name: found[name] for name in names}
