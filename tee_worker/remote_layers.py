"""Whole decoder layers on the GPU worker: what stands in their place here, and a cache that only counts."""

from __future__ import annotations

import inspect
import secrets
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from shmbroker.client import Client
from shmbroker.errors import BadInput
from shmbroker.failover import FailoverOp
from shmbroker.remote_op import RemoteOp

_ENDED_AT_ONCE = 4
"""Ended sessions that one call tells of: what a call tells must fit into its frame."""


class _Counted(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer whose keys and values are on the worker: it knows how many there are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def count(self, tokens: int) -> None:
        """So many more tokens were seen."""
        self.length += tokens

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise BadInput(
            "at split 'layer' the keys and values are on the GPU worker: beam search, contrastive search and assisted generation, which reorder or "
            "cut them, need split 'op', 'fused' or 'linear'"
        )

    update = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = reset = _refuse


class _CountedWindow(_Counted, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The same of a layer with a sliding window, whose masks are cut by it."""

    def __init__(self, window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, window)
        self.length = 0

    def count(self, tokens: int) -> None:
        self.length += tokens
        self.cumulative_length = self.length

    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes


class Sessions:
    """What all remote layers of one model share: the op, and the sessions by their caches."""

    def __init__(self, client: Client, op: RemoteOp | FailoverOp, layers: int) -> None:
        self._client = client
        self._op = op
        self._layers = layers
        self._ids: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self._ended: deque[int] = deque()
        self._placed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(
        self, layer: int, hidden: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """One layer, one call."""
        arguments: dict[str, Any] = {"layer": layer}
        past = 0
        counted: _Counted | None = None
        if cache is not None:
            session = self._session(cache)
            found = cache.layers[layer]
            assert isinstance(found, _Counted)
            counted, past = found, found.length
            arguments.update(session=session, past=past)
        if self._ended:
            arguments["ended"] = [self._ended.popleft() for _ in range(min(_ENDED_AT_ONCE, len(self._ended)))]
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1]).unsqueeze(0)
        inputs = [hidden, self._inside("positions", position_ids)]
        if mask is not None:
            inputs.append(self._inside("mask", mask))
        output: torch.Tensor = self._op(*inputs, **arguments)
        if counted is not None:
            counted.count(hidden.shape[1])
        return output

    def _inside(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in shared memory: all layers of a pass are given the same one, which so is copied once."""
        known = self._placed.get(what)
        if known is None or known[0] is not tensor:
            self._placed[what] = known = (tensor, self._client.copy_in(tensor))
        return known[1]

    def _session(self, cache: Cache) -> int:
        known = self._ids.get(cache)
        if known is not None:
            return known
        if type(cache) is not DynamicCache:
            raise BadInput(
                f"at split 'layer' the cache is the GPU worker's: a {type(cache).__name__} cannot be used, leave past_key_values and cache_implementation out"
            )
        if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            raise BadInput("at split 'layer' only caches of keys and values are known; this model keeps another state: use split 'op'")
        if cache.get_seq_length():
            raise BadInput(
                "at split 'layer' a cache that was filled elsewhere cannot be gone on with: its keys and values are not on the worker"
            )
        cache.layers = [
            _CountedWindow(int(layer.sliding_window)) if isinstance(layer, DynamicSlidingWindowLayer) else _Counted()
            for layer in cache.layers
        ] or [_Counted() for _ in range(self._layers)]
        session = self._ids[cache] = secrets.randbits(62) + 1
        weakref.finalize(cache, self._ended.append, session)
        return session


class RemoteLayer(nn.Module):
    """Mixed into a layer's own class, which its model may look at; its parts are gone."""

    index: int
    sessions: Sessions
    signature: inspect.Signature

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One call; arguments as the layer's own."""
        if args:
            kwargs.update(self.signature.bind(hidden_states, *args, **kwargs).arguments)
        cache = kwargs.get("past_key_values") if kwargs.get("use_cache", True) else None
        return self.sessions.run(self.index, hidden_states, kwargs.get("position_ids"), kwargs.get("attention_mask"), cache)


def make_remote(layer: nn.Module, index: int, sessions: Sessions) -> None:
    """Turn ``layer`` into one that is computed elsewhere, and let its weights go."""
    signature = inspect.signature(layer.forward)
    kind = type(layer)
    for name, _ in list(layer.named_children()):
        delattr(layer, name)
    layer.__class__ = type(kind.__name__, (RemoteLayer, kind), {})
    layer.index = index  # type: ignore[assignment]
    layer.sessions = sessions  # type: ignore[assignment]
    layer.signature = signature  # type: ignore[assignment]
