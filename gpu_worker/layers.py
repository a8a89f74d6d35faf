"""Whole decoder layers and their halves, run by the model's own modules, with the keys and values of each session kept here.

A session belongs to the channel that it was begun on, and ends with it at the latest. A call tells how many tokens its session must have seen at its
layer: a worker that does not have exactly these refuses, so an answer is never computed from another past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models import LayerCall, decoder_layers, first_of, halves_of, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

READ_ON_HOST = (1, 2)
"""Inputs of an op with a session that are read here before the device has anything to do: positions and session."""

_CACHES = "caches"
"""Where the sessions of a channel are in its state."""


class Layers:
    """The decoder layers of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers = [layer for _, layer in decoder_layers(model)]
        self._names = [name for name, _ in decoder_layers(model)]
        self._rotary = rotary_of(model)
        self._turned: dict[tuple[str, ...], tuple[torch.Tensor, Any]] = {}
        """The last positions with their rotary embedding, by kind of layer: those of a pass are the same for each of its layers."""
        self._placed: tuple[torch.Tensor, torch.Tensor] | None = None
        """The last positions as the client gave them, and where the model computes."""

    def full_layer(self, layer: int, channel_state: dict[str, Any]) -> Callable[..., None]:
        """The op of a whole layer."""
        return self._with_session(layer, self._layer(layer), channel_state)

    def attention_block(self, layer: int, channel_state: dict[str, Any]) -> Callable[..., None]:
        """The op of a layer's attention."""
        return self._with_session(layer, self._half(layer, "attention"), channel_state)

    def mlp_block(self, layer: int) -> Callable[..., None]:
        """The op of a layer's feed-forward."""
        module = self._half(layer, "feed_forward")
        width = self._model.config.get_text_config().hidden_size
        refusal = f"the feed-forward of {type(self._layer(layer)).__name__} is more than a function of its input: use split 'layer' or 'op'"
        try:
            tried = first_of(module(torch.zeros(1, 1, width, dtype=self._model.dtype, device=self._model.device)))
        except TypeError as error:
            raise BadInput(refusal) from error
        if not isinstance(tried, torch.Tensor) or tried.shape != (1, 1, width):
            raise BadInput(refusal)

        def run(hidden: torch.Tensor, *, out: torch.Tensor) -> None:
            out.copy_(first_of(module(hidden)))

        return run

    def name_of(self, layer: int, half: str | None = None) -> str:
        """The name in the model of a layer, or of its ``attention`` or ``feed_forward``."""
        whole = self._layer(layer)
        if half is None:
            return self._names[layer]
        self._half(layer, half)
        return f"{self._names[layer]}.{getattr(halves_of(whole), half)}"

    def _layer(self, layer: int) -> nn.Module:
        if not 0 <= layer < len(self._layers):
            raise BadInput(
                f"this worker's model has {len(self._layers)} layers, no layer {layer}: are both workers started with the same --model?"
            )
        return self._layers[layer]

    def _half(self, layer: int, which: str) -> nn.Module:
        whole = self._layer(layer)
        halves = halves_of(whole)
        if halves is None:
            raise BadInput(
                f"the layers of this worker's model, {type(whole).__name__}, have no attention and feed-forward that could be told apart"
            )
        return whole.get_submodule(getattr(halves, which))

    def _with_session(self, layer: int, module: nn.Module, channel_state: dict[str, Any]) -> Callable[..., None]:
        caches: dict[int, DynamicCache] = channel_state.setdefault(_CACHES, {})
        call = LayerCall(self._model, layer, module)

        def run(
            hidden: torch.Tensor,
            position_ids: torch.Tensor,
            session: torch.Tensor,
            *mask: torch.Tensor,
            out: torch.Tensor,
            ended: Sequence[int] = (),
        ) -> None:
            for one in ended:
                caches.pop(one, None)
            number, past = session.tolist()
            cache = self._cache(caches, number, layer, past) if number else None
            positions = self._positions(position_ids)
            out.copy_(call(hidden, positions, mask[0] if mask else None, cache, self._embedded))

        return run

    def _embedded(self, hidden: torch.Tensor, position_ids: torch.Tensor, kind: tuple[str, ...]) -> Any:
        assert self._rotary is not None
        known = self._turned.get(kind)
        # Positions that are the same are the same object (_positions): comparing values would wait for a device.
        if known is None or known[0] is not position_ids:
            known = self._turned[kind] = position_ids, self._rotary(hidden, position_ids, *kind)
        return known[1]

    def _positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """A pass's positions where the model computes, the same tensor for each of its layers."""
        placed = self._placed
        if placed is None or not torch.equal(placed[0], position_ids):
            own = position_ids.clone()
            placed = self._placed = own, own.to(self._model.device)
        return placed[1]

    def _cache(self, caches: dict[int, DynamicCache], session: int, layer: int, past: int) -> DynamicCache:
        from transformers.cache_utils import DynamicCache

        cache = caches.get(session)
        if cache is None:
            cache = caches[session] = DynamicCache(config=self._model.config)
        seen = cache.get_seq_length(layer)
        if seen != past:
            del caches[session]
            raise BadInput(
                f"session {session:x} has seen {seen} tokens at layer {layer} here, {past} at the client: the worker that kept its keys and values "
                "is gone, or a call of it failed; start the generation anew"
            )
        return cache
