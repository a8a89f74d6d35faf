"""Which module of a model runs where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


def folded(places: Iterable[tuple[str, str]], layers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``places`` with the rows of layers that are equal as one: ``model.layers.0-3,28-29.mlp.up_proj``. ``layers``: the names of all of them."""
    index_of = {name: index for index, name in enumerate(layers)}
    of_layer: dict[int, list[tuple[str, str]]] = {}
    rows: list[tuple[int | None, str, str]] = []
    for name, where in places:
        layer = next((head for head in _heads(name) if head in index_of), None)
        if layer is None:
            rows.append((None, name, where))
            continue
        index = index_of[layer]
        if index not in of_layer:
            rows.append((index, "", ""))
        of_layer.setdefault(index, []).append((name.removeprefix(layer), where))
    told: list[list[tuple[str, str]]] = []
    for first, name, where in rows:
        if first is None:
            yield name, where
        elif of_layer[first] not in told:
            told.append(of_layer[first])
            equal = [index for index, inside in sorted(of_layer.items()) if inside == of_layer[first]]
            above, _, number = layers[first].rpartition(".")
            numbers = _ranges([int(layers[index].rpartition(".")[2]) for index in equal]) if len(equal) > 1 else number
            yield from ((f"{above}.{numbers}{suffix}", where) for suffix, where in of_layer[first])


def _heads(name: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,28-29`` of 0, 1, 2, 3, 28, 29."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
