"""Modules that stand in the model for what the GPU worker computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import nn

from shmbroker.client import ClientMemory, Op


class RemoteEmbedding(nn.Module):
    """``[batch, tokens]`` ids, int64, to ``[batch, tokens, width]``."""

    def __init__(self, op: Op, width: int) -> None:
        super().__init__()
        self.embedding_dim = width
        self._op = op

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """One call."""
        rows: torch.Tensor = self._op(ids)
        return rows


class RemoteRows(nn.Embedding):
    """An embedding whose rows are asked for. Mixed in under the model's own class, which may do something with them (Gemma scales them)."""

    rows: RemoteEmbedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """One call."""
        rows: torch.Tensor = self.rows(ids)
        return rows


def remote_embedding(module: nn.Embedding, rows: RemoteEmbedding, dtype: torch.dtype) -> nn.Module:
    """``module`` with its rows computed elsewhere: what its class makes of them, it goes on making of them here."""
    kind = type(module)
    if kind is nn.Embedding:
        return rows
    module.__class__ = type(kind.__name__, (kind, RemoteRows), {})  # the class's super().forward() is RemoteRows.forward now
    module.rows = rows
    module.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)  # its dtype is looked at
    return module


class RemoteLinear(nn.Module):
    """``[..., in_features]`` to ``[..., out_features]``, one call."""

    def __init__(self, op: Op, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        y: torch.Tensor = self._op(x)
        return y


class FusedCall(threading.local):
    """Linear layers that are given the same tensor one after the other: the first asks for all, the others take what came.

    A layer that is given something else than the tensor that was asked for (or that tensor changed since) is asked for anew, with all. Each
    thread that runs the model has its own.
    """

    def __init__(self, op: Op, count: int) -> None:
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


class FusedLinear(nn.Module):
    """One of several linear layers that share a call."""

    def __init__(self, call: FusedCall, index: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._call = call
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first of them calls."""
        return self._call.take(self._index, x)


class SplitAttention:
    """Attention with its two matrix products on the GPU worker; scaling, mask and softmax stay here.

    Keys and values are repeated to the number of heads where they are placed, so repeating is the only copy. Softmax runs in place on the
    block that the scores came in, which then is the next call's input.
    """

    def __init__(self, memory: ClientMemory, matmul: Op) -> None:
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
        weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; the result lies in shared memory.

        query ``[batch, heads, tokens, head_dim]``, key and value ``[batch, kv_heads, length, ...]`` to ``[batch, tokens, heads, value_dim]``.
        ``mask``: what is added to the scores, or booleans, False where a token is not seen. ``weights``: whether to return a copy of those of attention too.
        """
        heads = query.shape[1]
        keys = self._repeated(key, heads)
        scores: torch.Tensor = self._matmul(query, keys.transpose(2, 3))
        del keys  # its block is free for what comes next
        scores.mul_(scaling)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None and mask.dtype is torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores.add_(mask)
        if scores.dtype is torch.float32:
            torch.softmax(scores, dim=-1, out=scores)
        else:
            scores.copy_(torch.softmax(scores, dim=-1, dtype=torch.float32))
        mixed: torch.Tensor = self._matmul(scores, self._repeated(value, heads))
        batch, _, tokens, width = mixed.shape
        # The next projection takes [batch, tokens, heads * width]: laid out so here, it need not be copied in.
        result = self._memory.empty((batch, tokens, heads, width), mixed.dtype)
        result.copy_(mixed.transpose(1, 2))
        return result, scores.clone() if weights else None

    def _repeated(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        batch, kv_heads, length, width = tensor.shape
        room = self._memory.empty((batch, heads, length, width), tensor.dtype)
        room.view(batch, kv_heads, heads // kv_heads, length, width).copy_(tensor[:, :, None])
        return room
