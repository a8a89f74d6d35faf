"""One cache as the chunks of a prompt see it that are on their way at once: each what is before it, in turns at each layer."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from tee_worker.offloading.baton import Baton
from tee_worker.offloading.remote_cache import Counted


class Turns:
    """The order of the chunks of one prompt at each layer: a chunk has its turn when the one before it is done there."""

    def __init__(self, layers: int, baton: Baton) -> None:
        self._baton = baton
        self._done = [0] * layers
        self._failed = False
        self._changed = threading.Condition()

    def wait(self, layer: int, chunk: int) -> None:
        """Until the turn of ``chunk`` at ``layer``. Raises :class:`AnotherChunkFailed` when it will not come."""
        if self._done[layer] < chunk:  # only ever grows
            self._baton.pass_on()
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._failed or self._done[layer] >= chunk)
            finally:
                self._baton.take()
        if self._failed:
            raise AnotherChunkFailed("another chunk of this prompt failed")

    def done(self, layer: int) -> None:
        """One more chunk is."""
        with self._changed:
            self._done[layer] += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """No turn will come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class AnotherChunkFailed(Exception):
    """Not the cause of anything."""


class _ChunkLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of the cache as one chunk sees it: tokens before it are counted, its own are put where all are, when it is its turn."""

    def __init__(self, whole: Any, turns: Turns, layer: int, chunk: int, start: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._whole, self._turns, self._layer, self._chunk, self._start = whole, turns, layer, chunk, start
        self.is_sliding = whole.is_sliding

    def get_seq_length(self) -> int:
        return self._start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        window = getattr(self._whole, "sliding_window", None)
        if window is None:
            return self._start + query_length, 0
        kept = min(self._start, int(window) - 1)
        return kept + query_length, self._start - kept

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._turns.wait(self._layer, self._chunk)
        found: tuple[torch.Tensor, torch.Tensor] = self._whole.update(key_states, value_states, *args, **kwargs)
        self._turns.done(self._layer)
        return found


class _CountedChunk(Counted):  # type: ignore[no-untyped-call]
    """The same of a layer whose keys and values are on the worker."""

    def __init__(self, whole: Counted, turns: Turns, layer: int, chunk: int, start: int) -> None:
        super().__init__(whole.refusal, start)
        self._whole, self._turns, self._layer, self._chunk, self._start = whole, turns, layer, chunk, start
        self.is_sliding = whole.is_sliding

    get_mask_sizes = _ChunkLayer.get_mask_sizes

    def wait(self) -> None:
        self._turns.wait(self._layer, self._chunk)

    def count(self, tokens: int) -> None:
        self._whole.count(tokens)
        self._turns.done(self._layer)


def chunk_cache(whole: DynamicCache, turns: Turns, chunk: int, start: int) -> DynamicCache:
    """The cache ``whole`` as its ``chunk``, which begins at token ``start``, is to see it."""
    cache = DynamicCache()
    cache.layers = [
        _CountedChunk(layer, turns, index, chunk, start) if isinstance(layer, Counted) else _ChunkLayer(layer, turns, index, chunk, start)
        for index, layer in enumerate(whole.layers)
    ]
    return cache
