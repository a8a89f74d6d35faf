"""Whole decoder layers, and their halves, on the GPU worker: what stands in their place here."""

from __future__ import annotations

import inspect
import secrets
import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from shmbroker.call.client_memory import ClientMemory
from shmbroker.call.remote_op import RemoteOp
from shmbroker.client.failover import FailoverOp
from shmbroker.errors import BadInput
from tee_worker.offloading.remote_cache import ON_THE_WORKER, counted, is_plain

_ENDED_AT_ONCE = 4
"""Ended sessions that one call tells of: what a call tells must fit into its frame."""

Op = RemoteOp | FailoverOp


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


class _Remote(nn.Module):
    """Mixed into a module's own class, which its model may look at; its parts are gone."""

    op: Op
    index: int
    sessions: Sessions
    signature: inspect.Signature

    def _run(self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if args:
            kwargs.update(self.signature.bind(hidden_states, *args, **kwargs).arguments)
        cache = kwargs.get("past_key_values") if kwargs.get("use_cache", True) else None
        return self.sessions.run(self.op, self.index, hidden_states, kwargs.get("position_ids"), kwargs.get("attention_mask"), cache)


class RemoteLayer(_Remote):
    """A whole decoder layer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One call; arguments as the layer's own."""
        return self._run(hidden_states, args, kwargs)


class RemoteAttention(_Remote):
    """A layer's attention."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """One call; arguments as the attention's own."""
        return self._run(hidden_states, args, kwargs), None


class RemoteFeedForward(nn.Module):
    """A layer's feed-forward: ``[batch, tokens, width]`` to the same."""

    op: Op

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """One call."""
        output: torch.Tensor = self.op(hidden_states)
        return output


def make_remote(module: nn.Module, mixin: type[_Remote], op: Op, index: int, sessions: Sessions) -> None:
    """Turn a layer, or its attention, into one that is computed elsewhere, and let its weights go."""
    signature = inspect.signature(module.forward)
    become(module, mixin, op)
    module.index = index  # type: ignore[assignment]
    module.sessions = sessions  # type: ignore[assignment]
    module.signature = signature  # type: ignore[assignment]


def become(module: nn.Module, mixin: type[nn.Module], op: Op) -> None:
    """Mix ``mixin`` into the class of ``module``, and let its parts go."""
    kind = type(module)
    for name, _ in list(module.named_children()):
        delattr(module, name)
    for name, _ in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)
    module.__class__ = type(kind.__name__, (mixin, kind), {})
    module.op = op  # type: ignore[assignment]
