"""Caches whose keys and values are elsewhere: on the GPU worker, or in another cache of this process. What is here only counts."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from shmbroker.errors import BadInput
from tee_worker.offloading.baton import Baton

ON_THE_WORKER = (
    "at splits 'block' and 'layer' the keys and values are on the GPU worker: beam search, contrastive search and assisted generation, which reorder "
    "or cut them, need split 'op', 'fused' or 'linear'"
)
IN_MICRO_BATCHES = (
    "with --pipeline and several sequences the keys and values are kept by micro-batch: beam search, contrastive search and assisted generation, which "
    "reorder or cut them, need --pipeline 1"
)


class Counted(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer whose keys and values are elsewhere: it knows how many there are."""

    def __init__(self, refusal: str, length: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal = refusal
        self.length = length

    def get_seq_length(self) -> int:
        """Tokens that are kept elsewhere."""
        return self.length

    def wait(self) -> None:
        """Until what is before this part of a pass has been counted."""

    def count(self, tokens: int) -> None:
        """So many more tokens were seen."""
        self.length += tokens

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise BadInput(self.refusal)

    update = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = reset = _refuse


class CountedWindow(Counted, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The same of a layer with a sliding window, whose masks are cut by it."""

    def __init__(self, refusal: str, window: int, length: int = 0) -> None:
        DynamicSlidingWindowLayer.__init__(self, window)
        self.refusal = refusal
        self.length = self.cumulative_length = length

    def count(self, tokens: int) -> None:
        """So many more tokens were seen."""
        self.length += tokens
        self.cumulative_length = self.length

    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes


def counted(like: Any, refusal: str) -> Counted:
    """A counting layer in the place of ``like``."""
    if isinstance(like, DynamicSlidingWindowLayer):
        return CountedWindow(refusal, int(like.sliding_window))
    return Counted(refusal)


def is_plain(cache: Cache) -> bool:
    """Whether ``cache`` keeps keys and values in the way of :class:`DynamicCache`, and no other state."""
    return type(cache) is DynamicCache and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


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
