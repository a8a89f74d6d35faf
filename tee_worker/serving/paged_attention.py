"""Attention of many sequences in one pass: each sequence by itself, over its own keys and values in Hugging Face's paged cache.

One product under one mask for all of them computes every query against every sequence's keys, to throw nearly all of it away. Sequence by sequence it is
the very call that the sequence would make alone, and gives its bits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput
from tee_worker.offloading.uncompiled import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "shmbroker_paged"
ATTRIBUTE = "shmbroker_attended_by"
"""Where an attention module keeps what attends one sequence."""

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""As Hugging Face calls it: module, query ``[1, heads, tokens, head_dim]``, key, value, a mask or None."""

_thread = threading.local()


@contextlib.contextmanager
def paged() -> Iterator[None]:
    """For the length of a block, forward passes of this thread are of many sequences; all others are of one, as ever."""
    _thread.paged = True
    try:
        yield
    finally:
        _thread.paged = False


def is_paged() -> bool:
    """Whether this thread's pass is of many sequences."""
    return getattr(_thread, "paged", False)


@uncompiled
def paged_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As Hugging Face calls it. In a pass of many sequences all tensors have batch 1 and the tokens of all, one sequence after the other."""
    attend: Attention = getattr(module, ATTRIBUTE)
    if not is_paged():
        return attend(module, query, key, value, attention_mask, **kwargs)
    if cache is None:
        raise BadInput(f"{type(module).__name__} does not hand the paged cache to its attention: serve this model with --max-concurrency 1")
    layer = module.layer_idx
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    of_queries, of_keys = kwargs.pop("cu_seq_lens_q").tolist(), kwargs.pop("cu_seq_lens_k").tolist()
    for one in (
        "read_index",
        "write_index",
        "block_table",
        "max_length_q",
        "max_length_k",
        "is_causal",
        "logits_indices",
        "logits_processor_args",
    ):
        kwargs.pop(one, None)
    window = getattr(cache.layer_to_allocator[layer], "sliding_window", None)
    parts = []
    for first, end, first_key, end_key in zip(of_queries[:-1], of_queries[1:], of_keys[:-1], of_keys[1:], strict=True):
        tokens, keys = end - first, end_key - first_key
        mask = None if tokens == 1 else _mask(tokens, keys, window, query.dtype, attend)
        parts.append(
            attend(module, query[:, :, first:end], key[:, :, first_key:end_key], value[:, :, first_key:end_key], mask, **kwargs)[0]
        )
    return torch.cat(parts, dim=1), None


def _mask(tokens: int, keys: int, window: int | None, dtype: torch.dtype, attend: Attention) -> torch.Tensor | None:
    """Of the last ``tokens`` of ``keys`` tokens, ``[1, 1, tokens, keys]``; None where the attention knows it itself."""
    if _fused(attend) and tokens == keys and (window is None or keys <= window):
        return None
    last = torch.arange(keys - tokens, keys)[:, None]
    at = torch.arange(keys)[None]
    seen = (at <= last) if window is None else (at <= last) & (at > last - window)
    if _fused(attend):
        return seen[None, None]
    return torch.zeros(tokens, keys, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def _fused(attend: Attention) -> bool:
    """Whether it is torch's own, which takes booleans and knows that it is causal."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return attend is sdpa_attention_forward


class PagedAttention:
    """Every attention of a model, made able to take part in passes of many sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Installs it."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._model = model
        self._before = model.config._attn_implementation or "eager"
        mask_of = ALL_MASK_ATTENTION_FUNCTIONS[self._before]

        def mask(*args: Any, **kwargs: Any) -> Any:
            return None if is_paged() else mask_of(*args, **kwargs)

        for module in model.modules():
            if getattr(module, "layer_idx", None) is None or not hasattr(module, "config"):
                continue
            config: Any = module.config
            name = config._attn_implementation or "eager"
            attend = _eager_of(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
            if attend is not None:
                setattr(module, ATTRIBUTE, attend)
        AttentionInterface.register(NAME, paged_attention_forward)
        AttentionMaskInterface.register(NAME, mask)
        model.set_attn_implementation(NAME)

    @contextlib.contextmanager
    def without(self) -> Iterator[None]:
        """The model as it was, for the length of a block in which no pass of many sequences runs: some models look at the attention's name."""
        self.remove()
        try:
            yield
        finally:
            self._model.set_attn_implementation(NAME)

    def remove(self) -> None:
        """The model as it was."""
        self._model.set_attn_implementation(self._before)


def _eager_of(module: nn.Module) -> Attention | None:
    """The attention that a model's own file computes it with."""
    import sys

    found: Attention | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return found
