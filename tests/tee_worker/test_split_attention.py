"""Attention whose products are computed elsewhere: what is handed over, and that it is attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tee_worker.offloading.remote_modules import SplitAttention


class Memory:
    """Private memory in place of an arena."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


class Products:
    """The op, computed here; ``sent``: shapes of its inputs."""

    def __init__(self) -> None:
        self.sent: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.sent.append((tuple(a.shape), tuple(b.shape)))
        return torch.matmul(a, b)


def attention() -> tuple[SplitAttention, Products]:
    products = Products()
    memory: Any = Memory()
    op: Any = products
    return SplitAttention(memory, op, eager=False), products


def causal(tokens: int, length: int) -> torch.Tensor:
    """A mask that is added, for the last ``tokens`` of ``length``."""
    seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
    return torch.zeros(1, 1, tokens, length).masked_fill_(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("laid_out", ["by heads", "by tokens"])
@pytest.mark.parametrize(("heads", "sharing"), [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize(
    ("batch", "tokens", "length"), [(1, 1, 1), (1, 1, 50), (2, 7, 7), (2, 5, 40), (1, 16, 30), (1, 17, 30), (1, 80, 80)]
)
def test_it_is_attention_and_of_few_tokens_keys_and_values_are_sent_once(
    batch: int, tokens: int, length: int, heads: int, sharing: int, laid_out: str
) -> None:
    torch.manual_seed(heads * length)
    query = torch.randn(batch, heads, tokens, 16) if laid_out == "by heads" else torch.randn(batch, tokens, heads, 16).transpose(1, 2)
    key, value = torch.randn(batch, sharing, length, 16), torch.randn(batch, sharing, length, 24)
    mask = causal(tokens, length)
    split, products = attention()
    threads = torch.get_num_threads()
    result, weights = split(query, key, value, mask, 0.25, weights=True)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True)
    assert torch.allclose(result, expected.transpose(1, 2), atol=1e-5)
    assert weights is not None
    assert weights.shape == (batch, heads, tokens, length)
    assert torch.allclose(weights.sum(-1), torch.ones(batch, heads, tokens), atol=1e-5)
    count = sharing if tokens <= 16 else heads
    rows = heads // count * tokens
    assert products.sent == [
        ((batch, count, rows, 16), (batch, count, 16, length)),
        ((batch, count, rows, length), (batch, count, length, 24)),
    ]
    assert torch.get_num_threads() == threads
