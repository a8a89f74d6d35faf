"""What a model is given to do, and how long it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SMALLEST_ID, LARGEST_ID = 100, 40_000
"""Of the tokens in a prompt: within the vocabulary of every model here, and none of the few that mark something."""


@dataclass(frozen=True, slots=True)
class Work:
    """A checkpoint's folder, and so many tokens."""

    model: Path
    prefill_tokens: int
    prompt_tokens: int
    """Before those that are decoded."""
    decode_tokens: int

    def prefill(self, model: Any) -> float:
        """Seconds."""
        return prefill(model, self.prefill_tokens)

    def decode(self, model: Any) -> float:
        """Seconds, the short prompt's prefill among them."""
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
