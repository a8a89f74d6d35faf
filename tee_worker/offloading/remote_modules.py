"""Modules that stand in the model for what the GPU worker computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from shmbroker.client import ClientMemory, Op
from shmbroker.models import features, missing_parameters
from shmbroker.models.threads import SingleThreaded
from tee_worker.offloading.uncompiled import uncompiled
from tee_worker.offloading.weight_elsewhere import WeightElsewhere
from tee_worker.planning.attention_products import product_count


class _Elsewhere(nn.Module):
    """Mixed in before a module's own class. Its parameters are on the GPU worker; what is known of them can be looked at."""

    @property
    def weight(self) -> Any:
        """Its shape, dtype and device."""
        return self.known.get("weight")

    @property
    def bias(self) -> Any:
        """As the weight; None where there is none."""
        return self.known.get("bias")

    known: dict[str, WeightElsewhere]


class RemoteRows(_Elsewhere, nn.Embedding):  # type: ignore[override]
    """An embedding, ``[batch, tokens]`` ids, int64, to ``[batch, tokens, width]``, whose rows are asked for.

    Mixed in below the model's own class, which may do something with them (Gemma scales them).
    """

    op: Op

    @uncompiled
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """One call."""
        rows: torch.Tensor = self.op(ids)
        return rows


class RemoteLinear(_Elsewhere):
    """``[..., in_features]`` to ``[..., out_features]``."""

    op: Callable[[torch.Tensor], torch.Tensor]

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call, or its share of one."""
        y: torch.Tensor = self.op(x)
        return y


def remote_embedding(module: nn.Embedding, name: str, op: Op, dtype: torch.dtype) -> None:
    """Have the rows of ``module`` computed elsewhere: what its class makes of them, it goes on making of them here."""
    shape = (module.num_embeddings, module.embedding_dim)
    module.register_parameter("weight", None)
    # A class's own super().forward() is RemoteRows.forward then.
    _become(module, (type(module), RemoteRows) if type(module) is not nn.Embedding else (RemoteRows,))
    module.op = op  # type: ignore[assignment]
    module.known = {"weight": WeightElsewhere(f"{name}.weight", shape, dtype, op)}  # type: ignore[assignment]


def remote_linear(module: nn.Module, name: str, op: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    """Have the linear layer ``module`` computed elsewhere, by ``op``."""
    inside, outside = features(module)
    known = {"weight": WeightElsewhere(f"{name}.weight", (outside, inside) if isinstance(module, nn.Linear) else (inside, outside), dtype)}
    if "bias" in missing_parameters(module) or module._parameters.get("bias") is not None:
        known["bias"] = WeightElsewhere(f"{name}.bias", (outside,), dtype)
    for parameter in ("weight", "bias"):
        module.register_parameter(parameter, None)
    _become(module, (RemoteLinear, type(module)))
    module.op = op  # type: ignore[assignment]
    module.known = known  # type: ignore[assignment]


def _become(module: nn.Module, bases: tuple[type[nn.Module], ...]) -> None:
    module.__class__ = type(type(module).__name__, bases, {})


class FusedCall(threading.local):
    """Linear layers that are given the same tensor one after the other: the first asks for all, the others take what came.

    A layer that is given something else than the tensor that was asked for (or that tensor changed since) is asked for anew, with all. Each
    thread that runs the model has its own.
    """

    def __init__(self, op: Callable[[torch.Tensor], Any], count: int) -> None:
        self._op = op
        self._waiting: list[torch.Tensor | None] = [None] * count
        self._input: torch.Tensor | None = None
        self._version = 0

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer ``index`` for ``x``."""
        ready = self._waiting[index]
        version = 0 if x.is_inference() else x._version
        if self._input is not x or self._version != version or ready is None:
            outputs: Sequence[torch.Tensor] = self._op(x)
            self._waiting = list(outputs)
            self._input, self._version = x, version
            ready = self._waiting[index]
            assert ready is not None
        self._waiting[index] = None
        if not any(waiting is not None for waiting in self._waiting):
            self._input = None  # all taken: nothing is kept alive between layers
        return ready


class SplitAttention:
    """Attention with its two matrix products on the GPU worker; scaling, mask and softmax stay here.

    Of few tokens, heads that share keys and values are rows of one product (:mod:`tee_worker.planning.attention_products`); of more, keys and values are
    repeated where they are placed, so repeating is the only copy. Softmax runs in place on the block that the scores came in, which then is the next
    call's input.
    """

    def __init__(self, memory: ClientMemory, matmul: Op, *, eager: bool) -> None:
        """``eager``: whether the model's own attention adds every mask to the scores, one of booleans too."""
        self.eager = eager
        self._memory = memory
        self._matmul = matmul

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        *,
        sinks: torch.Tensor | None = None,
        weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; the result lies in shared memory.

        query ``[batch, heads, tokens, head_dim]``, key and value ``[batch, kv_heads, length, ...]`` to ``[batch, tokens, heads, value_dim]``.
        ``mask``: what is added to the scores, or booleans, False where a token is not seen. ``sinks`` ``[heads]``: scores of a
        token that every one sees and that has no value. ``weights``: whether to return a copy of those of attention too.
        """
        batch, heads, tokens, _ = query.shape
        length, width, count = key.shape[2], value.shape[3], product_count(heads, key.shape[1], tokens)
        keys = self._repeated(key, count)
        products: torch.Tensor = self._matmul(self._grouped(query, count), keys.transpose(2, 3))
        del keys  # its block is free for what comes next
        scores = products.view(batch, heads, tokens, length)
        scores.mul_(scaling)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None and mask.dtype is torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores.add_(mask)
        if sinks is not None:
            _softmax_with_sinks(scores, sinks)
        elif scores.dtype is torch.float32:
            _softmax(scores)
        else:
            scores.copy_(torch.softmax(scores, dim=-1, dtype=torch.float32))
        mixed: torch.Tensor = self._matmul(products, self._repeated(value, count))
        # The next projection takes [batch, tokens, heads * width]: laid out so here, it need not be copied in.
        result = self._memory.empty((batch, tokens, heads, width), mixed.dtype)
        result.copy_(mixed.view(batch, heads, tokens, width).transpose(1, 2))
        return result, scores.clone() if weights else None

    def _grouped(self, query: torch.Tensor, count: int) -> torch.Tensor:
        """``[batch, heads, tokens, head_dim]`` as ``[batch, count, heads / count * tokens, head_dim]``; what has to be laid out anew lies in the arena."""
        batch, heads, tokens, width = query.shape
        if heads == count:
            return query
        if tokens > 1 and not query.is_contiguous():
            query = self._repeated(query, heads)
        return query.reshape(batch, count, heads // count * tokens, width)

    def _repeated(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        batch, kv_heads, length, width = tensor.shape
        room = self._memory.empty((batch, heads, length, width), tensor.dtype)
        room.view(batch, kv_heads, heads // kv_heads, length, width).copy_(tensor[:, :, None])
        return room


_WORTH_SHARING = 1 << 15
"""Numbers, of a softmax: some 30 us on one core, a part of what waking another thread costs."""


def _softmax(scores: torch.Tensor) -> None:
    """In place, float32, over the last dimension. Few numbers by this thread alone: the library below shares work of any size."""
    if scores.numel() >= _WORTH_SHARING:
        torch.softmax(scores, dim=-1, out=scores)
        return
    with SingleThreaded():
        torch.softmax(scores, dim=-1, out=scores)


def _softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> None:
    """In place, ``[batch, heads, tokens, length]``: what the sink of its head takes of each row is left out, so a row's sum is below 1."""
    wide = scores.float()
    total = torch.logaddexp(torch.logsumexp(wide, dim=-1, keepdim=True), sinks.float().view(1, -1, 1, 1))
    scores.copy_(wide.sub_(total).exp_())
