"""From floating-point weights to integers whose products with rows never wrap.

Weights: symmetric, a scale for each output channel, the same function on both sides and on the CPU. Activations (:func:`shmbroker.trust.loops.seal`): a
scale for each row, so large that by the inequality of Cauchy and Schwarz no output leaves 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shmbroker.errors import BadInput
from shmbroker.trust.bits import check_bits

LARGEST = 2**31 - 1

_NUMBERS_AT_ONCE = 1 << 18
"""Of a weight that are float64 at a time: as many as a cache holds."""


def _rows_at_once(columns: int) -> int:
    return max(1, _NUMBERS_AT_ONCE // max(1, columns))


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """The weight of a linear layer, or of several with the same input, ``[out, in]``, as integers."""

    integers: torch.Tensor
    """int16, of absolute value below 2^(bits - 1)."""
    scales: torch.Tensor
    """float32 ``[out]``: integers times scale is the weight, but for rounding."""
    bits: int

    def limit(self) -> float:
        """The norm that a row of activations is scaled to: with rounding, which adds at most half of the root of the columns, no output is beyond 31 bits.

        Raises :class:`BadInput` where nothing is left for the row.
        """
        largest = 1.0
        step = _rows_at_once(self.integers.shape[1])
        for first in range(0, len(self.integers), step):
            part = self.integers[first : first + step].to(torch.float64)
            largest = max(largest, float(torch.linalg.vector_norm(part, dim=1).max()))
        room = LARGEST / largest - math.sqrt(self.integers.shape[1]) / 2
        if room < 1:
            raise BadInput(f"rows of {self.integers.shape[1]} columns are too long for weights of {self.bits} bits")
        return room


def quantize_weight(weight: torch.Tensor, bits: int) -> IntegerWeight:
    """``weight``: ``[out, in]``, any floating-point dtype. Raises :class:`BadInput` for bits that there are not, and for numbers that are not finite."""
    check_bits(bits)
    largest_integer = 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    integers = torch.empty((rows, columns), dtype=torch.int16)
    scales = torch.ones(rows, dtype=torch.float32)
    step = _rows_at_once(columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        wide = weight[part].detach().to(device="cpu", dtype=torch.float64, copy=True)
        if not columns:
            continue
        largest = torch.linalg.vector_norm(wide, ord=math.inf, dim=1)
        if not torch.isfinite(largest).all():
            raise BadInput("a weight that is not finite cannot be made an integer")
        found = (largest / largest_integer).to(torch.float32)
        scales[part] = torch.where(found > 0, found, torch.ones_like(found))
        # The scale was rounded: the largest element may be half a step beyond.
        integers[part] = wide.div_(scales[part].to(torch.float64)[:, None]).round_().clamp_(-largest_integer, largest_integer)
    return IntegerWeight(integers, scales, bits)


def joined(weights: Sequence[IntegerWeight]) -> IntegerWeight:
    """Weights with the same input as one."""
    if len(weights) == 1:
        return weights[0]
    return IntegerWeight(torch.cat([one.integers for one in weights]), torch.cat([one.scales for one in weights]), weights[0].bits)
