"""What a decoder is made of, found by running it once rather than by the names of its classes.

Layers that were given the very same tensor can be asked for together; the order of the notes is the order of the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models import LayerHalves, adapters, decoder_layers, features, halves_of, is_linear
from tee_worker.planning.run_once import Attention, LinearNote, Notes, run_once
from tee_worker.planning.splits import Split, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers that take one input together, in the order in which the model runs them."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Returns:
    """How many values a layer and its halves return as a tuple; None: one that is in none."""

    layer: int | None = None
    attention: int | None = None
    feed_forward: int | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """A decoder: embedding, projections and attentions in order of a forward pass, and the head."""

    embedding: str
    width: int
    projections: tuple[Projection, ...]
    attentions: tuple[Attention, ...]
    head: Projection
    dtype: torch.dtype
    layers: tuple[str, ...] = ()
    """The decoder layers; empty where they could not be told."""
    halves: tuple[LayerHalves | None, ...] = ()
    """The two halves of each layer; None where they could not be told."""
    returns: tuple[Returns, ...] = ()
    """Of each layer."""
    windows: tuple[int | None, ...] = ()
    """Of each layer: earlier tokens that its cache keeps, and one; None for all."""
    additive_masks: bool = False
    """Whether attention is given a mask of numbers every time (``eager``), rather than of booleans where it cannot do without (``sdpa``)."""

    def split_of(self, module: str, splits: Splits) -> Split:
        """The split at which ``module`` is computed: its layer's."""
        index = self.layer_of(module)
        return splits.uniform or splits.outside if index is None else splits.of_layers(len(self.layers))[index]

    def moves_whole(self, module: str, splits: Splits) -> bool:
        """Whether ``module`` is inside of what moves as a whole: a layer, or one of its halves."""
        return self.layer_of(module) is not None and self.split_of(module, splits).stateful

    def layer_of(self, module: str) -> int | None:
        """The index of the layer that ``module`` is in."""
        return next((index for index, name in enumerate(self.layers) if module.startswith(f"{name}.")), None)


def structure_of(model: PreTrainedModel, split: Split | Splits | str = Split.FUSED) -> Structure:
    """Find the structure of ``model``, whose parameters need not be there, and see that it can be split so.

    Raises :class:`BadInput` when an embedding or a head is missing, the model does something with them that is not known, or cannot be split so.
    """
    splits = Splits.named(split)
    kind = type(model).__name__
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(embedding, nn.Embedding) or embedding not in names:
        raise BadInput(f"{kind} embeds tokens with a {type(embedding).__name__}, which is not known here")
    if not isinstance(head, nn.Linear) or not is_linear(head):
        raise BadInput(f"the language-model head of {kind} is a {type(head).__name__}, which is no plain linear layer")
    layers = decoder_layers(model)
    halves = tuple(halves_of(layer) for _, layer in layers)
    of_layers = splits.of_layers(len(layers))
    _check(model, splits, of_layers, halves)
    notes = run_once(model, [layer for _, layer in layers], halves)
    added = adapters(model)
    for (name, layer), one, found in zip(layers, of_layers, halves, strict=True):
        if one.stateful and (adapted := next((added[module] for module in layer.modules() if module in added), None)) is not None:
            raise BadInput(
                f"split {one.value!r}: {adapted} has an adapter, which would be left out on the GPU worker: use split 'op', 'fused' or 'linear'"
            )
        _check_whole(name, layer, one, found, notes)
    projections = tuple(_group([note for note in notes.linears if note.module is not head]))
    if not projections and not any(one.stateful for one in of_layers):
        raise BadInput(f"{kind} has no linear layers to compute elsewhere")
    return Structure(
        embedding=names[embedding],
        width=embedding.embedding_dim,
        projections=projections,
        attentions=tuple(notes.attentions),
        head=Projection((names[head],), head.in_features, (head.out_features,)),
        dtype=model.dtype,
        layers=tuple(name for name, _ in layers),
        halves=halves,
        returns=_returns([layer for _, layer in layers], halves, notes),
        windows=_windows(model, len(layers)),
        additive_masks=model.config._attn_implementation == "eager",
    )


def _check(model: PreTrainedModel, splits: Splits, of_layers: tuple[Split, ...], halves: tuple[LayerHalves | None, ...]) -> None:
    kind = type(model).__name__
    if not of_layers and (splits.uniform is None or splits.uniform.stateful):
        raise BadInput(f"split {str(splits)!r}: the decoder layers of {kind} could not be told from its other modules; use split 'op'")
    for index, (split, found) in enumerate(zip(of_layers, halves, strict=True)):
        if split is Split.BLOCK and found is None:
            raise BadInput(
                f"split 'block': attention and feed-forward of layer {index} of {kind} could not be told apart; use split 'op' or 'layer'"
            )


def _check_whole(name: str, layer: nn.Module, split: Split, found: LayerHalves | None, notes: Notes) -> None:
    """See that what moves as a whole can be handed all that it is given, and that its keys and values can be kept elsewhere."""
    from tee_worker.planning.layer_arguments import check_feed_forward, check_whole

    if split is Split.LAYER:
        check_whole(name, layer, notes.calls.get(layer))
    elif split is Split.BLOCK:
        assert found is not None
        check_whole(f"{name}.{found.attention}", attention := layer.get_submodule(found.attention), notes.calls.get(attention))
        check_feed_forward(f"{name}.{found.feed_forward}", notes.calls.get(layer.get_submodule(found.feed_forward)))


def _windows(model: PreTrainedModel, layers: int) -> tuple[int | None, ...]:
    from transformers.cache_utils import DynamicCache

    kept = DynamicCache(config=model.config).layers
    return tuple(getattr(layer, "sliding_window", None) for layer in kept) if len(kept) == layers else (None,) * layers


def _returns(layers: Sequence[nn.Module], halves: Sequence[LayerHalves | None], notes: Notes) -> tuple[Returns, ...]:
    def count(module: nn.Module) -> int | None:
        note = notes.calls.get(module)
        return len(note.output) if note is not None and isinstance(note.output, tuple) else None

    return tuple(
        Returns(count(layer))
        if found is None
        else Returns(count(layer), count(layer.get_submodule(found.attention)), count(layer.get_submodule(found.feed_forward)))
        for layer, found in zip(layers, halves, strict=True)
    )


def _group(linears: Sequence[LinearNote]) -> Iterator[Projection]:
    """Runs of layers that were given the same tensor, unchanged, one after the other."""
    run: list[LinearNote] = []
    for note in [*linears, None]:
        if run and (note is None or note.given is not run[0].given or note.version != run[0].version):
            sizes = [features(one.module) for one in run]
            yield Projection(tuple(one.name for one in run), sizes[0][0], tuple(width for _, width in sizes))
            run = []
        if note is not None:
            run.append(note)
