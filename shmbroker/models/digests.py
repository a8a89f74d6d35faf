"""Digests of weights: by them a client that has the weights sees that the GPU worker holds the same ones."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.models.checkpoint import missing_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEX_DIGITS = 16

_WORDS = 4096
"""Of 8 bytes, that are one number before they are hashed."""


def digest_of(tensor: torch.Tensor) -> str:
    """Of all bytes of a tensor, in the order of its elements, and of its shape and dtype: to find mistakes, not malice.

    Each run of words is weighted with odd numbers, summed modulo 2^64, and the sums are hashed: any one word that differs makes another sum, at 4 GB/s,
    which no hash of this library has.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // (8 * _WORDS) * (8 * _WORDS)
    if whole:
        words = flat[:whole].view(torch.int64).view(-1, _WORDS)
        digest.update((words @ _weights()).view(torch.uint8).numpy().data)
    if whole < flat.numel():
        digest.update(flat[whole:].numpy().data)
    return digest.hexdigest()[:HEX_DIGITS]


def _weights() -> torch.Tensor:
    return torch.arange(1, _WORDS + 1) * 0x9E3779B1 | 1


def digests_of(module: nn.Module) -> dict[str, str]:
    """Of all parameters in ``module``, by their names in it; empty where one of them was not loaded here."""
    if any(missing_parameters(inner) for inner in module.modules()) or any(one.is_meta for one in module.parameters()):
        return {}
    return {name: digest_of(parameter) for name, parameter in module.named_parameters()}


_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "_attn_implementation", "_attn_implementation_internal")
"""Of a configuration: where it came from, and who reads it."""


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the configurations, of model and of generation, and of every parameter and buffer as they lie in memory, so in the dtype they were loaded in.

    Nobody can make another model with the same. The tokenizer is no part of it.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    generation = {} if model.generation_config is None else model.generation_config.to_dict()
    generation = {name: value for name, value in generation.items() if name not in _NOT_OF_THE_MODEL}
    digest = hashlib.sha256(json.dumps([config, generation], sort_keys=True, default=str).encode())
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
