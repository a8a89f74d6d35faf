"""Which parameters of a model stay in the TEE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.models import ModelSource, decoder_layers, halves_of, tee_part
from tee_worker.planning.splits import Split, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def own_part(source: ModelSource, dtype: torch.dtype, split: Split | Splits | str = Split.FUSED) -> PreTrainedModel:
    """The model of ``source`` with the parameters that stay in the TEE at ``split``; the others are None. Raises :class:`BadInput`."""
    splits = Splits.named(split)
    moved: set[nn.Module] = set()

    def keep(model: PreTrainedModel, module: nn.Module) -> bool:
        if not moved:  # of the one model that is being made
            moved.update(inside(model, splits))
            moved.add(model)  # which has no parameters of its own
        return module not in moved and tee_part(model, module)

    return source.model(dtype, keep=keep)


def inside(model: PreTrainedModel, splits: Splits) -> set[nn.Module]:
    """All modules that are inside of what moves as a whole: layers, and their halves."""
    layers = decoder_layers(model)
    found: set[nn.Module] = set()
    for (_, layer), split in zip(layers, splits.of_layers(len(layers)), strict=True):
        if split is Split.LAYER:
            found.update(layer.modules())
        elif split is Split.BLOCK and (halves := halves_of(layer)) is not None:
            for name in (halves.attention, halves.feed_forward):
                found.update(layer.get_submodule(name).modules())
    return found
