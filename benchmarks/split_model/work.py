"""What a model is given to do, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

SMALLEST_ID, LARGEST_ID = 100, 40_000
"""Of the tokens in a prompt: within the vocabulary of every model here, and none of the few that mark something."""


class Times(NamedTuple):
    """Seconds."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Work:
    """A checkpoint's folder, and so many tokens."""

    model: Path
    prefill_tokens: int
    prompt_tokens: int
    """Before those that are decoded."""
    decode_tokens: int

    def times(self, model: Any) -> Times:
        """Of a prefill, and of a decode with its short prompt's prefill."""
        return Times(prefill(model, self.prefill_tokens), self.decode(model))

    def decode(self, model: Any) -> float:
        """Seconds, of a decode with its short prompt's prefill."""
        ids, count = prompt(self.prompt_tokens), self.decode_tokens
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - begun


def prompt(tokens: int) -> torch.Tensor:
    """``[1, tokens]``, int64; the same ones each time."""
    return torch.randint(SMALLEST_ID, LARGEST_ID, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def prefill(model: Any, tokens: int) -> float:
    """Seconds."""
    ids = prompt(tokens)
    begun = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begun


def medians(rounds: Sequence[Times]) -> Times:
    """Of each by itself."""
    return Times(statistics.median(one.prefill for one in rounds), statistics.median(one.decode for one in rounds))
