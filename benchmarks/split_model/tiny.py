"""A model of random weights that is so small that its calls cost nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.split_model.work import LARGEST_ID


def make_tiny(folder: Path) -> Path:
    """Save it in ``folder`` as a checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LARGEST_ID, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=1024, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder
