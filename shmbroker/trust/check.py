"""Freivalds' check: whether an output is the product, in time of the input and the output, not of the weight.

For secret vectors R and S = W R, made once, a row x with the output y is right if x S = y R modulo 2^64. A deviation d below 2^32 in each place passes
one vector for one value in 2^32 of any place where it is not zero, and both vectors with probability 2^-64. The output is that of the integers, not of
their remainders modulo 2^32: in the ring itself a deviation of 2^31 in two places would pass half of the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

VECTORS = 2

_RANDOM_BITS = 32
_HALF_BITS = 16
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """Of one weight; never shown, stored or sent."""

    outputs: torch.Tensor
    """R, int32 ``[VECTORS, out]``, uniform."""
    inputs: torch.Tensor
    """S, int64 ``[VECTORS, in]``, modulo 2^64."""


def make_secret(integers: torch.Tensor, random: Callable[[int], bytes] = os.urandom, *, bits: int = _RANDOM_BITS) -> Secret:
    """A secret for the integer weight ``[out, in]``. ``random``: bytes from the system's source; ``bits``: fewer only to show the law.

    S is found by exact products of float64: R in two halves, and no more rows at once than 53 bits have room for.
    """
    rows, columns = integers.shape
    count = rows * VECTORS
    drawn = torch.frombuffer(bytearray(random(4 * count)), dtype=torch.int32) if count else torch.zeros(0, dtype=torch.int32)
    outputs = (drawn >> (_RANDOM_BITS - bits)).view(VECTORS, rows)
    wide = outputs.to(torch.int64)
    high = wide >> _HALF_BITS
    halves = torch.cat([wide - (high << _HALF_BITS), high]).to(torch.float64)
    total = torch.zeros((2 * VECTORS, columns), dtype=torch.int64)
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        total += (halves[:, part] @ integers[part].to(torch.float64)).to(torch.int64)
    return Secret(outputs, total[:VECTORS] + (total[VECTORS:] << _HALF_BITS))
