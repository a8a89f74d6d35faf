"""Of how many matrix products an attention at split ``op`` is made, for each sequence: of one for each head, or for each head of keys and values."""

from __future__ import annotations

TOGETHER_TOKENS = 16
"""With so few tokens, those of a decode above all, handing over keys and values is what counts: heads that share them are rows of one product. With more,
the arithmetic is, and a library shares as many products as there are heads more evenly among its threads: 9 of 512 rows took 2.0 ms on two cores, 3 of 1536
rows 2.9 ms. Keys and values are repeated then where they are placed, which is one copy in any case."""


def product_count(heads: int, key_value_heads: int, tokens: int) -> int:
    """``heads`` or ``key_value_heads``, for ``tokens`` new tokens."""
    return key_value_heads if tokens <= TOGETHER_TOKENS else heads
