"""Which module of a model runs where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def places(model: PreTrainedModel, structure: Structure, splits: Splits) -> Iterator[tuple[str, str]]:
    """Module by module at ``splits``: its name, and where it runs. What moves as a whole is one line."""
    projected = {name for projection in structure.projections for name in projection.names}
    attentions = {attention.name for attention in structure.attentions}
    whole: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(f"{one}." for one in whole)):
            continue
        split = structure.split_of(name, splits)
        index = structure.layers.index(name) if name in structure.layers else None
        if index is not None:
            if splits.of_layers(len(structure.layers))[index] is Split.LAYER:
                whole.append(name)
                yield name, "GPU worker, with its keys and values"
            continue
        layer = structure.layer_of(name)
        halves = structure.halves[layer] if layer is not None else None
        if split is Split.BLOCK and halves is not None and name == f"{structure.layers[layer or 0]}.{halves.attention}":
            whole.append(name)
            yield name, "GPU worker, with its keys and values"
        elif split is Split.BLOCK and halves is not None and name == f"{structure.layers[layer or 0]}.{halves.feed_forward}":
            whole.append(name)
            yield name, "GPU worker"
        elif name in projected or name in (structure.embedding, *structure.head.names):
            yield name, "GPU worker"
        elif name in attentions:
            products = "GPU worker" if split is Split.OP else "TEE"
            yield name, f"TEE: mask, softmax; {products}: Q @ K^T, attention @ V"
        elif not any(module.children()):
            yield name, "TEE"
