"""A client's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shmbroker.errors import BadInput

if TYPE_CHECKING:
    pass


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor or array as a tensor. Raises :class:`BadInput` for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "__array__"):
        raise BadInput(f"a {type(value).__name__} cannot be handed over: give a torch tensor or a NumPy array")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"a {type(value).__name__} cannot be handed over as a tensor: {error}") from None
