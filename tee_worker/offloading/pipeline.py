"""The pipeline: one forward pass in parts that are on their way at once, so that the GPU worker computes for one while the TEE computes for another.

Several sequences go as micro-batches, each with its own cache. One long prompt goes in chunks, as a wavefront: a chunk enters a layer as soon as the one
before it has put its keys and values into that layer's cache, which is all that it depends on. Tokens come out as without.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from shmbroker.errors import BadInput
from tee_worker.offloading.baton import Baton
from tee_worker.offloading.uncompiled import uncompiled
from tee_worker.planning.pass_parts import Part, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache

    from tee_worker.offloading.sessions import Sessions

_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}
"""What a pass in parts can be given; with anything else it goes whole."""


class Pipeline:
    """Stands before the forward pass of a model's decoder."""

    def __init__(self, model: PreTrainedModel, ways: int, baton: Baton, sessions: Sessions | None) -> None:
        self._decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        self._forward: Callable[..., Any] = self._decoder.forward
        self._config = model.config
        self._ways = ways
        self._baton = baton
        self._sessions = sessions
        self._threads = ThreadPoolExecutor(ways, thread_name_prefix="pipeline")
        self._micro_batches: weakref.WeakKeyDictionary[Cache, list[DynamicCache]] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """From now on the model's passes go through here."""

        @uncompiled
        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        self._decoder.forward = forward

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's pass; arguments as its own."""
        told = {
            name: value for name, value in kwargs.items() if value is not None and name not in ("output_attentions", "output_hidden_states")
        }
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        wanted = any(
            getattr(self._config, name, False) if kwargs.get(name) is None else kwargs[name]
            for name in ("output_attentions", "output_hidden_states")
        )
        if (
            args
            or wanted
            or ids is None
            or not told.keys() <= _ARGUMENTS
            or (mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2))
        ):
            return self._forward(*args, **kwargs)
        parts = parts_of(ids.shape[0], ids.shape[1], self._ways)
        if len(parts) == 1:
            return self._forward(*args, **kwargs)
        return (self._in_chunks if ids.shape[0] == 1 else self._in_micro_batches)(parts, self._cache(kwargs), kwargs)

    def _cache(self, kwargs: dict[str, Any]) -> Cache | None:
        cache: Cache | None = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and (getattr(self._config, "use_cache", True) if use_cache is None else use_cache):
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache(config=self._config)
        return cache

    # --- several sequences ------------------------------------------------------------------------------------------------------------

    def _in_micro_batches(self, parts: Sequence[Part], cache: Cache | None, kwargs: dict[str, Any]) -> Any:
        caches: Sequence[DynamicCache | None] = [None] * len(parts)
        if cache is not None:
            caches = self._caches_of(cache, len(parts))

        def run(part: Part, own: DynamicCache | None) -> Any:
            rows = slice(part.first_row, part.first_row + part.rows)
            return self._forward(
                input_ids=kwargs["input_ids"][rows],
                attention_mask=_rows(kwargs.get("attention_mask"), rows),
                position_ids=_rows(kwargs.get("position_ids"), rows),
                past_key_values=own,
                use_cache=own is not None,
            )

        outputs = self._at_once([functools.partial(run, part, own) for part, own in zip(parts, caches, strict=True)])
        if cache is not None:
            layers: list[Any] = cache.layers
            for layer in layers:
                layer.count(kwargs["input_ids"].shape[1])
        return _joined(outputs, 0, cache)

    def _caches_of(self, cache: Cache, count: int) -> list[DynamicCache]:
        from transformers.cache_utils import DynamicCache

        from tee_worker.offloading.remote_cache import IN_MICRO_BATCHES, counted
        from tee_worker.planning.layer_arguments import is_plain

        caches = self._micro_batches.get(cache)
        if caches is None:
            if not is_plain(cache) or cache.get_seq_length():
                raise BadInput(
                    f"with --pipeline and several sequences the keys and values are kept by micro-batch: this {type(cache).__name__} cannot be gone on "
                    "with; leave past_key_values and cache_implementation out, or use --pipeline 1"
                )
            caches = self._micro_batches[cache] = [DynamicCache(config=self._config) for _ in range(count)]
            cache.layers = [counted(layer, IN_MICRO_BATCHES) for layer in caches[0].layers]
        if len(caches) != count:
            raise BadInput(
                f"this cache is of {len(caches)} micro-batches, not of {count}: a batch must keep its sequences from pass to pass"
            )
        return caches

    # --- one long prompt ----------------------------------------------------------------------------------------------------------------

    def _in_chunks(self, parts: Sequence[Part], cache: Cache | None, kwargs: dict[str, Any]) -> Any:
        from transformers.cache_utils import DynamicCache

        from tee_worker.offloading.chunk_cache import Turns, chunk_cache
        from tee_worker.planning.layer_arguments import is_plain

        kept = cache
        if cache is None:
            cache = DynamicCache(config=self._config)  # the later chunks need what the earlier ones have seen
        if not is_plain(cache):
            return self._forward(**kwargs)
        assert isinstance(cache, DynamicCache)
        if self._sessions is not None:
            self._sessions.number(cache)
        if not cache.layers:
            cache.layers = DynamicCache(config=self._config).layers
        past = cache.get_seq_length()
        turns = Turns(len(cache.layers), self._baton)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")

        def run(index: int, part: Part) -> Any:
            start = past + part.first_token
            tokens = slice(part.first_token, part.first_token + part.tokens)
            own = chunk_cache(cache, turns, index, start)
            if self._sessions is not None:
                self._sessions.join(own, cache)
            try:
                return self._forward(
                    input_ids=kwargs["input_ids"][:, tokens],
                    attention_mask=None if mask is None else mask[:, : start + part.tokens],
                    position_ids=None if positions is None else positions[..., tokens],
                    past_key_values=own,
                    use_cache=True,
                )
            except BaseException:
                turns.fail()
                raise

        return _joined(self._at_once([functools.partial(run, index, part) for index, part in enumerate(parts)]), 1, kept)

    # --- both -----------------------------------------------------------------------------------------------------------------------------

    def _at_once(self, runs: Sequence[Callable[[], Any]]) -> list[Any]:
        """The outcome of each, in threads that compute as this one does. Waits for all, then raises the first error that is one."""
        from tee_worker.offloading.chunk_cache import AnotherChunkFailed

        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def run(one: Callable[[], Any]) -> Any:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients and not inference):
                self._baton.take()
                try:
                    return one()
                finally:
                    self._baton.pass_on()

        futures = [self._threads.submit(run, one) for one in runs]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, AnotherChunkFailed)):
            raise error
        return [future.result() for future in futures]


def _rows(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]


def _joined(outputs: Sequence[Any], dim: int, cache: Cache | None) -> Any:
    """One outcome of several: of tokens (dim 1) or sequences (dim 0). Raises :class:`BadInput` for a field that is not known to be of parts."""
    joined = outputs[-1]
    more = [name for name, value in joined.items() if value is not None and name not in ("last_hidden_state", "past_key_values")]
    if more:
        raise BadInput(f"with --pipeline {', '.join(more)} of a pass would be those of its last part: leave them out, or use --pipeline 1")
    joined.last_hidden_state = torch.cat([output.last_hidden_state for output in outputs], dim=dim)
    joined.past_key_values = cache
    return joined
