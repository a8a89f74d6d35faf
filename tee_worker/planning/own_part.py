"""Which parameters of a model stay in the TEE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.models import ModelSource, decoder_layers, halves_of, is_linear, tee_part
from tee_worker.planning.run_once import run_once
from tee_worker.planning.splits import Split, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def own_part(source: ModelSource, dtype: torch.dtype, split: Split | Splits | str = Split.FUSED) -> PreTrainedModel:
    """The model of ``source`` with the parameters that stay in the TEE at ``split``; the others are None. Raises :class:`BadInput`."""
    splits = Splits.named(split)

    def load(also: frozenset[str]) -> PreTrainedModel:
        moved: set[nn.Module] = set()
        kept: set[nn.Module] = set()

        def keep(model: PreTrainedModel, module: nn.Module) -> bool:
            if not moved:  # of the one model that is being made
                moved.update(inside(model, splits))
                moved.add(model)  # which has no parameters of its own
                kept.update(model.get_submodule(name) for name in also)
            return module not in moved and (module in kept or tee_part(model, module))

        return source.model(dtype, keep=keep)

    model = load(frozenset())
    uncalled = _uncalled(model, inside(model, splits))
    return load(uncalled) if uncalled else model


def _uncalled(model: PreTrainedModel, moved: set[nn.Module]) -> frozenset[str]:
    """Linear layers that are not moved, since the model does not call them in every pass: it computes with their weights itself, or chooses among experts."""
    called = {note.name for note in run_once(model, (), ()).linears}
    return frozenset(name for name, module in model.named_modules() if is_linear(module) and module not in moved and name not in called)


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
