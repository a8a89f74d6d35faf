"""From floating-point numbers to integers whose products never wrap, and back.

Weights: symmetric, a scale for each output channel, the same function on both sides and on the CPU. Activations: a scale for each row, so large that by
the inequality of Cauchy and Schwarz no output leaves 32 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shmbroker.errors import BadInput

BITS = (8, 12, 14)
"""Of a weight."""

LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """The weight of one linear layer, ``[out, in]``, as integers."""

    integers: torch.Tensor
    """int16, of absolute value below 2^(bits - 1)."""
    scales: torch.Tensor
    """float64 ``[out]``: integers times scale is the weight, but for rounding."""
    bits: int

    @property
    def row_norm(self) -> float:
        """The largest norm that an integer row of activations may have: no output is then beyond 31 bits."""
        largest = self.integers.to(torch.float64).norm(dim=1).max().item() if self.integers.numel() else 0.0
        return LARGEST / max(largest, 1.0)


def quantize_weight(weight: torch.Tensor, bits: int) -> IntegerWeight:
    """``weight``: ``[out, in]``, any floating-point dtype. Raises :class:`BadInput` for bits that there are not, and for numbers that are not finite."""
    if bits not in BITS:
        raise BadInput(f"weights of {bits} bits are not known; there are: {', '.join(map(str, BITS))}")
    wide = weight.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(wide).all():
        raise BadInput("a weight that is not finite cannot be made an integer")
    largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scales = torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), torch.ones_like(largest))
    return IntegerWeight((wide / scales[:, None]).round().to(torch.int16), scales, bits)


def quantize_rows(rows: torch.Tensor, row_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, in]`` floating-point numbers to int32 and the scale of each row, float64 ``[rows]``; ``row_norm`` as of the weight that they meet.

    Rounding adds at most half of the root of the columns to a row's norm, which is left free. Raises :class:`BadInput` for numbers that are not finite.
    """
    wide = rows.detach().to(torch.float64)
    norms = wide.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise BadInput("activations that are not finite cannot be made integers")
    room = row_norm - math.sqrt(rows.shape[1]) / 2
    if room <= 0:
        raise BadInput(f"rows of {rows.shape[1]} columns are too long for these weights")
    scales = torch.where(norms > 0, room / norms, torch.ones_like(norms))
    return (wide * scales[:, None]).round().to(torch.int32), scales


def dequantize(
    outputs: torch.Tensor, rows: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``[rows, out]`` int32 to ``dtype``. ``rows``: the scales of the rows."""
    result = outputs.to(torch.float64) * (weight.scales / rows[:, None])
    if bias is not None:
        result += bias
    return result.to(dtype)
