"""Models for tests: tiny ones with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"

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


def save_characters(folder: Path) -> None:
    """A tokenizer of one token a character for a model of these sizes, with a chat template."""
    vocabulary = {"<pad>": 0, "<s>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", clean_up_tokenization_spaces=False)
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)
