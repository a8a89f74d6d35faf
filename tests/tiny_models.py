"""Models for tests: tiny ones with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Every size another, so that no two can be mixed up unnoticed."""


def tiny_llama(**changes: object) -> LlamaConfig:
    """A llama of these sizes."""
    return LlamaConfig(**{**SIZES, **changes})


def save_random(config: LlamaConfig, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of random weights, with biases that are not zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
