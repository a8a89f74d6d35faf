"""How a decoder layer, or its attention, is called with what travels: hidden states, positions, a mask, a cache. All else that it takes is left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models.parts import cache_parameter, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

Embed = Callable[[torch.Tensor, torch.Tensor, tuple[str, ...]], Any]
"""Rotary embeddings of hidden states and positions, for a kind of layer where kinds have their own."""

EMBEDDED = "position_embeddings"


class LayerCall:
    """One module of one model."""

    def __init__(self, model: PreTrainedModel, layer: int, module: nn.Module) -> None:
        """``module``: layer number ``layer`` of ``model``, or its attention. Raises :class:`BadInput` where its rotary embeddings cannot be made."""
        self._module = module
        self._parameters = inspect.signature(module.forward).parameters
        self._cache = cache_parameter(module)
        self._demanded = [
            name for name, one in list(self._parameters.items())[1:] if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
        ]
        self._rotary = rotary_of(model)
        by_type = self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        types: Sequence[str] = getattr(model.config.get_text_config(), "layer_types", None) or ()
        self._kind = (types[layer],) if by_type else ()
        if EMBEDDED in self._parameters and self._rotary is None:
            raise BadInput(f"where {type(model).__name__} makes the rotary embeddings of its layers could not be told")

    def __call__(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        embed: Embed | None = None,
    ) -> torch.Tensor:
        """``[batch, tokens, width]`` and positions ``[1 or batch, tokens]`` to ``[batch, tokens, width]``. ``embed``: for who makes embeddings once a pass."""
        arguments: dict[str, Any] = {
            **dict.fromkeys(self._demanded),
            "attention_mask": mask,
            "position_ids": positions,
            "use_cache": cache is not None,
        }
        if self._cache is not None:
            arguments[self._cache] = cache
        if EMBEDDED in self._parameters:
            arguments[EMBEDDED] = (embed or self._embed)(hidden, positions, self._kind)
        given = {name: value for name, value in arguments.items() if name in self._parameters}
        output: torch.Tensor = first_of(self._module(hidden, **given))
        return output

    def _embed(self, hidden: torch.Tensor, positions: torch.Tensor, kind: tuple[str, ...]) -> Any:
        assert self._rotary is not None
        return self._rotary(hidden, positions, *kind)


def first_of(result: Any) -> Any:
    """What a module computed, of all that it returns."""
    return result[0] if isinstance(result, tuple) else result
