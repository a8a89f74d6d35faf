"""Where a split model is, and in which dtype, when it has no parameters left by which Hugging Face's code would see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Placed:
    """Mixed in before the model's own class."""

    device = torch.device("cpu")
    dtype: torch.dtype


def place_without_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have ``model``, and each model in it, tell ``device`` and ``dtype``, where no parameter is left that does."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and next(part.parameters(), None) is None:
            kind = type(part)
            part.__class__ = type(kind.__name__, (_Placed, kind), {"dtype": dtype})
