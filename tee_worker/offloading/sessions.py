"""The sessions of a model on the GPU worker: one for each cache whose keys and values are there."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import deque
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from shmbroker.client import ClientMemory, Op
from shmbroker.errors import BadInput
from tee_worker.offloading.remote_cache import ON_THE_WORKER, counted, is_plain

_ENDED_AT_ONCE = 4
"""Ended sessions that one call tells of: what a call tells must fit into its frame."""


class Sessions:
    """What all remote layers of one model share: the sessions by their caches. Thread-safe."""

    def __init__(self, memory: ClientMemory, config: PretrainedConfig, remote: frozenset[int]) -> None:
        """``remote``: the layers whose keys and values are on the worker."""
        self._memory = memory
        self._config = config
        self._remote = remote
        self._numbers: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._ended: deque[int] = deque()
        self._placed = threading.local()

    def run(
        self, op: Op, layer: int, hidden: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """One layer, or its attention: one call."""
        number = past = 0
        state: Any = None
        if cache is not None:
            number = self.number(cache)
            state = cache.layers[layer]
            state.wait()
            past = state.length
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1]).expand(hidden.shape[0], -1)
        inputs = [hidden, self._inside("positions", position_ids), self._session(number, past)]
        if mask is not None:
            inputs.append(self._inside("mask", mask))
        arguments: dict[str, Any] = {"ended": self._some_ended()} if self._ended else {}
        output: torch.Tensor = op(*inputs, **arguments)
        if state is not None:
            state.count(hidden.shape[1])
        return output

    def number(self, cache: Cache) -> int:
        """The session of ``cache``, begun now if it is new. Raises :class:`BadInput` for one that cannot be the worker's."""
        known = self._numbers.get(cache)
        if known is not None:
            return known
        with self._lock:
            known = self._numbers.get(cache)
            return self._begin(cache) if known is None else known

    def join(self, part: Cache, whole: Cache) -> None:
        """Have ``part`` be of the session of ``whole``."""
        self._numbers[part] = self.number(whole)

    def _begin(self, cache: Cache) -> int:
        if type(cache) is not DynamicCache:
            raise BadInput(
                f"at splits 'block' and 'layer' the cache is the GPU worker's: a {type(cache).__name__} cannot be used, leave past_key_values and "
                "cache_implementation out"
            )
        if not is_plain(cache):
            raise BadInput(
                "at splits 'block' and 'layer' only caches of keys and values are known; this model keeps another state: use split 'op'"
            )
        if any(cache.get_seq_length(layer) for layer in self._remote if layer < len(cache.layers)):
            raise BadInput(
                "at splits 'block' and 'layer' a cache that was filled elsewhere cannot be gone on with: its keys and values are not on the worker"
            )
        made = list(cache.layers) or DynamicCache(config=self._config).layers
        cache.layers = [counted(layer, ON_THE_WORKER) if index in self._remote else layer for index, layer in enumerate(made)]
        number = self._numbers[cache] = secrets.randbits(62) + 1
        weakref.finalize(cache, self._ended.append, number)
        return number

    def _some_ended(self) -> list[int]:
        some: list[int] = []
        while self._ended and len(some) < _ENDED_AT_ONCE:
            try:
                some.append(self._ended.popleft())
            except IndexError:  # another thread was faster
                break
        return some

    def _inside(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in shared memory: all layers of a pass are given the same one, which so is copied once."""
        known = getattr(self._placed, what, None)
        if known is None or known[0] is not tensor:
            known = (tensor, self._memory.copy_in(tensor))
            setattr(self._placed, what, known)
        inside: torch.Tensor = known[1]
        return inside

    def _session(self, number: int, past: int) -> torch.Tensor:
        """The session's tensor, the same one for all layers of a pass."""
        known = getattr(self._placed, "session", None)
        if known is None or known[0] != (number, past):
            known = self._placed.session = (number, past), self._memory.copy_in(torch.tensor([number, past]))
        inside: torch.Tensor = known[1]
        return inside
