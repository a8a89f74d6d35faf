"""What a layer, or its attention, is given: told by what it is, so that nothing is left behind that its result depends on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from shmbroker.errors import BadInput
from tee_worker.planning.run_once import ABOUT_OUTPUTS, CallNote

EMBEDDED = "position_embeddings"

_PLAIN = (CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer)
"""What a cache layer that keeps keys and values, and no other state, is made of."""


@dataclass(frozen=True, slots=True)
class LayerArguments:
    """The arguments of one call of a layer that can be handed to another process."""

    hidden: torch.Tensor
    """``[batch, tokens, width]``."""
    positions: torch.Tensor | None
    """``[1 or batch, tokens]``, int64."""
    embedded: Any
    """What the model made of the positions, the same object for all layers of a pass."""
    mask: torch.Tensor | None
    cache: Cache | None


class LayerSignature:
    """The parameters of a layer's ``forward``."""

    def __init__(self, kind: str, signature: inspect.Signature, advice: str = "") -> None:
        """``kind``: what refusals call it. ``advice``: what they say to do."""
        self._kind = kind
        self._advice = f": {advice}" if advice else ""
        self._signature = signature
        self._first = next(iter(signature.parameters))
        self._defaults = {name: one.default for name, one in signature.parameters.items()}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerArguments:
        """Sort the arguments of a call. Raises :class:`BadInput` for one that is not None and cannot travel."""
        bound = self._signature.bind(*args, **kwargs).arguments if args else dict(kwargs)
        found: dict[str, Any] = {}
        for name, value in [*bound.items(), *_more(bound, self._signature)]:
            what = self._what(name, value)
            if what is None:
                continue
            if what in found and found[what] is not value:
                raise BadInput(f"{self._kind} is given two of one kind ({what}){self._advice}")
            found[what] = value
        return LayerArguments(found["hidden"], found.get("positions"), found.get("embedded"), found.get("mask"), found.get("cache"))

    def _what(self, name: str, value: Any) -> str | None:
        if name == self._first:
            return "hidden"
        if value is None or value is False or name in ABOUT_OUTPUTS or self._is_var(name):
            return None
        if isinstance(value, Cache):
            return "cache"
        if name == "position_ids":
            return "positions"
        if name == "attention_mask" and isinstance(value, torch.Tensor):
            return "mask"
        if name == EMBEDDED:
            return "embedded"
        if isinstance(value, bool | int | float | str) and value == self._defaults.get(name):
            return None
        raise BadInput(f"{self._kind} is given {name} ({_shown(value)}), which cannot be handed to the GPU worker{self._advice}")

    def _is_var(self, name: str) -> bool:
        parameter = self._signature.parameters.get(name)
        return parameter is not None and parameter.kind is inspect.Parameter.VAR_KEYWORD


def check_whole(name: str, module: nn.Module, note: CallNote | None, *, rotary: bool) -> None:
    """See that a layer, or an attention, can be computed elsewhere by what it was given in one call. Raises :class:`BadInput`.

    ``rotary``: whether it is known what the model makes rotary embeddings with.
    """
    if note is None:
        raise BadInput(f"{name} was not run")
    if not rotary and EMBEDDED in inspect.signature(module.forward).parameters:
        raise BadInput(f"where the model makes the rotary embeddings that {name} is given could not be told")
    given = LayerSignature(name, inspect.signature(module.forward)).arguments(note.args, note.kwargs)
    if given.cache is None:
        raise BadInput(f"{name} is given no cache of keys and values, which would be kept by the GPU worker")
    if not is_plain(given.cache):
        raise BadInput(f"{name} keeps another state than keys and values ({_state(given.cache)}), which the GPU worker cannot keep")
    if not isinstance(_first_of(note.output), torch.Tensor):
        raise BadInput(f"{name} returns a {type(note.output).__name__}, which is not known here")


def check_feed_forward(name: str, note: CallNote | None) -> None:
    """The same of a feed-forward, which is given one tensor. Raises :class:`BadInput`."""
    given = [] if note is None else [value for value in [*note.args, *note.kwargs.values()] if value is not None]
    if note is None or len(given) != 1 or not isinstance(given[0], torch.Tensor) or not isinstance(_first_of(note.output), torch.Tensor):
        raise BadInput(f"{name} is more than a function of one tensor")


def is_plain(cache: Cache) -> bool:
    """Whether ``cache`` keeps keys and values in the way of :class:`DynamicCache`, and no other state."""
    return type(cache) is DynamicCache and not cache.offloading and all(_is_plain_layer(layer) for layer in cache.layers)


def _is_plain_layer(layer: object) -> bool:
    """Of keys and values alone. What counts them for a split model is derived of these too."""
    kind = type(layer)
    return issubclass(kind, DynamicLayer) and all(base in _PLAIN for base in kind.__mro__ if base.__module__.startswith("transformers."))


def _state(cache: Cache) -> str:
    """What a cache that is not plain is."""
    odd = next((layer for layer in cache.layers if not _is_plain_layer(layer)), None)
    return type(cache if odd is None or type(cache) is not DynamicCache else odd).__name__


def _first_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _more(bound: Mapping[str, Any], signature: inspect.Signature) -> list[tuple[str, Any]]:
    """What was given beyond the parameters that have names."""
    return [
        item
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and isinstance(bound.get(name), dict)
        for item in bound[name].items()
    ]


def _shown(value: Any) -> str:
    return (
        f"a tensor {list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else repr(value)
        if isinstance(value, bool | int | float | str)
        else f"a {type(value).__name__}"
    )
