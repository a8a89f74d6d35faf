"""Which positions a rotary embedding was made of: many models hand their layers the embedding alone, and the worker makes it anew from the positions."""

from __future__ import annotations

import inspect
import threading
from collections import deque
from typing import Any

import torch
from torch import nn

from tee_worker.offloading.uncompiled import uncompiled

_REMEMBERED = 8
"""Embeddings of a pass: one for each kind of layer that has its own."""


class EmbeddedPositions:
    """Remembers, for each thread that runs the model, what its last rotary embeddings were made of."""

    def __init__(self, rotary: nn.Module | None) -> None:
        self._here = threading.local()
        if rotary is not None:
            self._signature = inspect.signature(rotary.forward)
            rotary.register_forward_hook(self._note, with_kwargs=True)

    def of(self, embedded: Any) -> torch.Tensor | None:
        """The positions that ``embedded`` was made of; None where that was not seen."""
        first = _first(embedded)
        return next((positions for made, positions in reversed(self._made()) if made is first), None)

    @uncompiled
    def _note(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], embedded: Any) -> None:
        positions = self._signature.bind(*args, **kwargs).arguments.get("position_ids")
        if isinstance(positions, torch.Tensor):
            self._made().append((_first(embedded), positions))

    def _made(self) -> deque[tuple[Any, torch.Tensor]]:
        try:
            made: deque[tuple[Any, torch.Tensor]] = self._here.made
        except AttributeError:
            made = self._here.made = deque(maxlen=_REMEMBERED)
        return made


def _first(embedded: Any) -> Any:
    return embedded[0] if isinstance(embedded, tuple | list) and embedded else embedded
