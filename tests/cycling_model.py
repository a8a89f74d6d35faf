"""A tiny model that says one character after the other, each by far the likeliest: a token too many, too few or in another's place shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import save_characters, tiny_llama

CONTEXT = 1024
FIRST, SIGNS, STEP = 2, 95, 37
"""The printable characters' tokens, and how far the next one is: they come round after all have come."""

_TO_CODE = 30
"""From a token to its character."""


def save_cycling(folder: Path) -> Path:
    """A checkpoint of it, with its tokenizer."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(tiny_llama(max_position_embeddings=CONTEXT))
    with torch.no_grad():
        embedding = torch.randn(model.config.vocab_size, model.config.hidden_size)
        model.model.embed_tokens.weight.copy_(embedding)
        for token in range(model.config.vocab_size):
            model.lm_head.weight[_following(token)] = embedding[token]
    model.save_pretrained(folder)
    save_characters(folder)
    return folder


def _following(token: int) -> int:
    return FIRST + (max(token, FIRST) - FIRST + STEP) % SIGNS


def expected(prompt: str, tokens: int) -> str:
    """What it says after a prompt."""
    token, said = ord(prompt[-1]) - _TO_CODE, ""
    for _ in range(tokens):
        token = _following(token)
        said += chr(token + _TO_CODE)
    return said
