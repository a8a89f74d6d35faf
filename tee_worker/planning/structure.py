"""What a decoder is made of, found by running it once rather than by the names of its classes.

Layers that were given the very same tensor can be asked for together; the order of the notes is the order of the calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models import LayerHalves, decoder_layers, features, halves_of, is_linear
from tee_worker.planning.fits import Fits
from tee_worker.planning.run_once import Attention, LinearNote, Notes, dtype_of, run_once
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
    rows: int
    """Of the embedding."""
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
    advice: str = ""
    """What to do where a call's arguments cannot be handed to the GPU worker: which splits keep them here."""

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
    notes = run_once(model, [layer for _, layer in layers], halves)
    fits = Fits(model, layers, halves, notes)
    fits.check(of_layers, splits.uniform)
    projections = tuple(_group([note for note in notes.linears if note.module is not head]))
    return Structure(
        embedding=names[embedding],
        rows=embedding.num_embeddings,
        width=embedding.embedding_dim,
        projections=projections,
        attentions=tuple(notes.attentions),
        head=Projection((names[head],), head.in_features, (head.out_features,)),
        dtype=dtype_of(embedding),
        layers=tuple(name for name, _ in layers),
        halves=halves,
        returns=_returns([layer for _, layer in layers], halves, notes),
        windows=_windows(model, len(layers)),
        additive_masks=model.config._attn_implementation == "eager",
        advice=fits.advice((Split.LINEAR, Split.FUSED, Split.OP)),
    )


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
    """Runs of layers that were given the same tensor, unchanged, one after the other; one that runs several times in a pass is alone."""
    times = Counter(note.name for note in linears)
    run: list[LinearNote] = []
    for note in [*linears, None]:
        alone = bool(run) and (times[run[-1].name] > 1 or (note is not None and times[note.name] > 1))
        if run and (note is None or alone or note.given is not run[0].given or note.version != run[0].version):
            sizes = [features(one.module) for one in run]
            yield Projection(tuple(one.name for one in run), sizes[0][0], tuple(width for _, width in sizes))
            run = []
        if note is not None:
            run.append(note)
