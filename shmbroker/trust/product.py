"""The product of integer rows and integer weights, modulo 2^32 and exact, as one product of float64 or several."""

from __future__ import annotations

import torch

_EXACT = 53
"""Bits of an integer that a float64 holds exactly."""


def columns_at_once(bits: int) -> int:
    """How many products of any 32-bit integer and a weight of ``bits`` can be summed in float64 with no rounding."""
    return 1 << (_EXACT - 31 - (bits - 1))


def product(rows: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """``[rows, in]`` int32, whatever its values, and the weight ``[in, out]`` as float64 integers, to ``[rows, out]`` int32: the sums modulo 2^32."""
    step = columns_at_once(bits)
    wide = rows.to(torch.float64)
    total: torch.Tensor | None = None
    for first in range(0, max(1, rows.shape[1]), step):
        part = (wide[:, first : first + step] @ weight[first : first + step]).to(torch.int64)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(torch.int32)
