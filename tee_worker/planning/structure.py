"""What a decoder is made of, found by running it once rather than by the names of its classes.

For one forward pass every linear layer and embedding is replaced by one that returns zeros of the right shape and notes what it was given.
Layers that were given the very same tensor can be asked for together; the order of the notes is the order of the calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models import LayerHalves, decoder_layers, features, halves_of, is_linear
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
class Attention:
    """The sizes of one attention module."""

    name: str
    heads: int
    key_value_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    """Earlier tokens that its cache keeps, and one; None for all."""


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


@dataclass(slots=True)
class _Notes:
    """What the modules were given. The tensors are kept, so that no two of them can have the same id."""

    linears: list[tuple[str, nn.Module, torch.Tensor]]
    attentions: list[Attention]


_PROBE = "shmbroker_probe"


def structure_of(model: PreTrainedModel, split: Split | Splits | str = Split.FUSED) -> Structure:
    """Find the structure of ``model``, whose linear layers and embeddings need not have weights.

    Projections and attentions inside of what ``split`` moves as a whole are left out, and need not have weights either. Raises
    :class:`BadInput` when an embedding or a head is missing, the model does something with them that is not known, or cannot be split so.
    """
    splits = Splits.named(split)
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(embedding, nn.Embedding) or embedding not in names:
        raise BadInput(f"{type(model).__name__} embeds tokens with a {type(embedding).__name__}, which is not known here")
    if not isinstance(head, nn.Linear):
        raise BadInput(f"{type(model).__name__} has no linear language-model head")
    notes = _Notes([], [])
    dtype = model.dtype
    layers = decoder_layers(model)
    halves = tuple(halves_of(layer) for _, layer in layers)
    of_layers = splits.of_layers(len(layers))
    _check(model, splits, of_layers, halves)
    with _noting(model, notes, dtype), _passing_over(layers, of_layers, halves), torch.inference_mode():
        # Two tokens: one alone takes short cuts in some models.
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    projections = tuple(_group([note for note in notes.linears if note[1] is not head]))
    if not projections and not any(one.stateful for one in of_layers):
        raise BadInput(f"{type(model).__name__} has no linear layers to compute elsewhere")
    return Structure(
        embedding=names[embedding],
        width=embedding.embedding_dim,
        projections=projections,
        attentions=tuple(notes.attentions),
        head=Projection((names[head],), head.in_features, (head.out_features,)),
        dtype=dtype,
        layers=tuple(name for name, _ in layers),
        halves=halves,
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


@contextlib.contextmanager
def _passing_over(
    layers: list[tuple[str, nn.Module]], of_layers: tuple[Split, ...], halves: tuple[LayerHalves | None, ...]
) -> Iterator[None]:
    """For the duration, what moves as a whole returns its input."""
    passed: list[nn.Module] = []
    for (_, layer), split, found in zip(layers, of_layers, halves, strict=True):
        if split is Split.LAYER:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
            passed.append(layer)
        elif split is Split.BLOCK:
            assert found is not None
            attention, feed_forward = layer.get_submodule(found.attention), layer.get_submodule(found.feed_forward)
            attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
            feed_forward.forward = lambda hidden_states: hidden_states
            passed += [attention, feed_forward]
    try:
        yield
    finally:
        for module in passed:
            del module.forward


def _windows(model: PreTrainedModel, layers: int) -> tuple[int | None, ...]:
    from transformers.cache_utils import DynamicCache

    kept = DynamicCache(config=model.config).layers
    return tuple(getattr(layer, "sliding_window", None) for layer in kept) if len(kept) == layers else (None,) * layers


@contextlib.contextmanager
def _noting(model: PreTrainedModel, notes: _Notes, dtype: torch.dtype) -> Iterator[None]:
    """For the duration, linear layers and embeddings return zeros, and everything is noted."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def note_attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        name = next(name for name, candidate in model.named_modules() if candidate is module)
        window = kwargs.get("sliding_window")
        assert window is None or isinstance(window, int)
        notes.attentions.append(Attention(name, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], window))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    patched: list[nn.Module] = []
    for name, module in model.named_modules():
        if is_linear(module):
            module.forward = _noting_linear(name, module, notes)
        elif module is model.get_input_embeddings():
            module.forward = _zero_embedding(module, dtype)
        else:
            continue
        patched.append(module)
    before = model.config._attn_implementation
    AttentionInterface.register(_PROBE, note_attention)
    AttentionMaskInterface.register(_PROBE, _no_mask)
    try:
        model.set_attn_implementation(_PROBE)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in patched:
            del module.forward


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


def _noting_linear(name: str, module: nn.Module, notes: _Notes) -> Callable[[torch.Tensor], torch.Tensor]:
    _, out_features = features(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        notes.linears.append((name, module, x))
        return x.new_zeros(*x.shape[:-1], out_features)

    return forward


def _zero_embedding(module: nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, int(module.embedding_dim), dtype=dtype)  # type: ignore[arg-type]

    return forward


def _group(linears: list[tuple[str, nn.Module, torch.Tensor]]) -> Iterator[Projection]:
    """Runs of layers that were given the same tensor one after the other."""
    run: list[tuple[str, nn.Module, torch.Tensor]] = []
    for note in [*linears, None]:
        if run and (note is None or note[2] is not run[0][2]):
            sizes = [features(module) for _, module, _ in run]
            yield Projection(tuple(name for name, _, _ in run), sizes[0][0], tuple(width for _, width in sizes))
            run = []
        if note is not None:
            run.append(note)
