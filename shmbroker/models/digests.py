"""Digests of weights: by them a client that has the weights sees that the GPU worker holds the same ones."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from shmbroker.models.checkpoint import missing_parameters

HEX_DIGITS = 16


def digest_of(tensor: torch.Tensor) -> str:
    """Of all bytes of a tensor, in the order of its elements, and of its shape and dtype."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=HEX_DIGITS // 2)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digests_of(module: nn.Module) -> dict[str, str]:
    """Of all parameters in ``module``, by their names in it; empty where one of them was not loaded here."""
    if any(missing_parameters(inner) for inner in module.modules()) or any(one.is_meta for one in module.parameters()):
        return {}
    return {name: digest_of(parameter) for name, parameter in module.named_parameters()}
