"""Whole decoder layers, run by the model's own modules, with the keys and values of each session kept here.

A session belongs to the channel that it was begun on, and ends with it at the latest. A call tells how many tokens its session must have seen at its
layer: a worker that does not have exactly these refuses, so an answer is never computed from another past.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.model_parts import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache


class Layers:
    """The decoder layers of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers = [layer for _, layer in decoder_layers(model)]
        self._parameters = [set(inspect.signature(layer.forward).parameters) for layer in self._layers]
        self._rotary: nn.Module | None = getattr(model.get_decoder(), "rotary_emb", None)  # type: ignore[no-untyped-call]
        self._by_type = self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._types: Sequence[str] = getattr(model.config.get_text_config(), "layer_types", None) or ()

    def sessions(self) -> Callable[..., None]:
        """The op ``full_layer`` for one channel: its sessions are its own, and go with it."""
        caches: dict[int, DynamicCache] = {}

        def run(
            hidden: torch.Tensor,
            position_ids: torch.Tensor,
            *mask: torch.Tensor,
            out: torch.Tensor,
            layer: int,
            session: int = 0,
            past: int = 0,
            ended: Sequence[int] = (),
        ) -> None:
            for one in ended:
                caches.pop(one, None)
            if not 0 <= layer < len(self._layers):
                raise BadInput(
                    f"this worker's model has {len(self._layers)} layers, no layer {layer}: are both workers started with the same --model?"
                )
            cache = self._cache(caches, session, layer, past) if session else None
            out.copy_(self._run(layer, hidden, position_ids, mask[0] if mask else None, cache))

        return run

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

    def _run(
        self, layer: int, hidden: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None, cache: DynamicCache | None
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self._rotary is not None and "position_embeddings" in self._parameters[layer]:
            kind = (self._types[layer],) if self._by_type else ()
            arguments["position_embeddings"] = self._rotary(hidden, position_ids, *kind)
        result = self._layers[layer](hidden, **{name: value for name, value in arguments.items() if name in self._parameters[layer]})
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output
