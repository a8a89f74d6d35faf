"""The sessions of a model on the GPU worker: one for each cache whose keys and values are there."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from shmbroker.client import ClientMemory, Op
from shmbroker.errors import BadInput
from tee_worker.offloading.embedded_positions import EmbeddedPositions
from tee_worker.offloading.remote_cache import ON_THE_WORKER, counted
from tee_worker.planning.layer_arguments import LayerArguments, is_plain

_ENDED_AT_ONCE = 4
"""Ended sessions that one call tells of: what a call tells must fit into its frame."""


class Sessions:
    """What all remote layers of one model share: the sessions by their caches. Thread-safe."""

    def __init__(
        self, memory: ClientMemory, config: PretrainedConfig, remote: frozenset[int], rotary: nn.Module | None, advice: str
    ) -> None:
        """``remote``: the layers whose keys and values are on the worker. ``rotary``: what the model embeds positions with. ``advice``: of refusals."""
        self._memory = memory
        self.advice = advice
        self._config = config
        self._remote = remote
        self._embedded = EmbeddedPositions(rotary)
        self._numbers: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._ended: deque[int] = deque()
        self._placed = threading.local()

    def run(self, op: Op, layer: int, given: LayerArguments) -> torch.Tensor:
        """One layer, or its attention: one call. Raises :class:`BadInput` where it cannot be told what its positions are."""
        number = past = 0
        state: Any = None
        if given.cache is not None:
            number = self.number(given.cache)
            state = given.cache.layers[layer]
            state.wait()
            past = state.length
        inputs = [given.hidden, self._inside("positions", self._positions(given, past)), self._session(number, past)]
        if given.mask is not None:
            inputs.append(self._inside("mask", given.mask))
        arguments: dict[str, Any] = {"ended": self._some_ended()} if self._ended else {}
        output: torch.Tensor = op(*inputs, **arguments)
        if state is not None:
            state.count(given.hidden.shape[1])
        return output

    def _positions(self, given: LayerArguments, past: int) -> torch.Tensor:
        """What the layer's rotary embedding was made of, the model's positions, or the next ones where the layer is given neither, as it has them from its input."""
        if given.embedded is not None:
            positions = self._embedded.of(given.embedded)
            positions = given.positions if positions is None else positions
            if positions is None:
                raise BadInput(f"the layer is given position_embeddings, and no positions that they were made of: {self.advice}")
            return positions
        if given.positions is not None:
            return given.positions
        batch, tokens = given.hidden.shape[:2]
        known: tuple[tuple[int, int, int], torch.Tensor] | None = getattr(self._placed, "next", None)
        if known is None or known[0] != (batch, tokens, past):
            known = self._placed.next = (batch, tokens, past), torch.arange(past, past + tokens).expand(batch, -1)
        return known[1]

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
                f"at splits 'block' and 'layer' only caches of keys and values are known; this model keeps another state: {self.advice}"
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
        known: tuple[torch.Tensor, int | None, torch.Tensor] | None = getattr(self._placed, what, None)
        # What was made in inference mode has no version that tells of a change.
        version = None if tensor.is_inference() else tensor._version
        if known is None or known[0] is not tensor or known[1] != version or (version is None and not torch.equal(known[2], tensor)):
            known = tensor, version, self._memory.copy_in(tensor)
            setattr(self._placed, what, known)
        return known[2]

    def _session(self, number: int, past: int) -> torch.Tensor:
        """The session's tensor, the same one for all layers of a pass."""
        known = getattr(self._placed, "session", None)
        if known is None or known[0] != (number, past):
            known = self._placed.session = (number, past), self._memory.copy_in(torch.tensor([number, past]))
        inside: torch.Tensor = known[1]
        return inside
