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


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """Of one weight; never shown, stored or sent."""

    outputs: torch.Tensor
    """R, int64 ``[out, VECTORS]``, uniform in [-2^31, 2^31)."""
    inputs: torch.Tensor
    """S, int64 ``[in, VECTORS]``, modulo 2^64."""


def make_secret(integers: torch.Tensor, random: Callable[[int], bytes] = os.urandom, *, bits: int = _RANDOM_BITS) -> Secret:
    """A secret for the integer weight ``[out, in]``. ``random``: bytes from the system's source; ``bits``: fewer only to show the law."""
    count = integers.shape[0] * VECTORS
    drawn = torch.frombuffer(bytearray(random(4 * count)), dtype=torch.int32) if count else torch.zeros(0, dtype=torch.int32)
    outputs = (drawn >> (_RANDOM_BITS - bits)).to(torch.int64).view(-1, VECTORS)
    return Secret(outputs, integers.to(torch.int64).t() @ outputs)


def wrong_rows(rows: torch.Tensor, outputs: torch.Tensor, secret: Secret) -> torch.Tensor:
    """Which rows of ``outputs``, int32 ``[rows, out]``, are not the products of ``rows``, int32 ``[rows, in]``: bool ``[rows]``."""
    difference = rows.to(torch.int64) @ secret.inputs - outputs.to(torch.int64) @ secret.outputs
    return difference.ne(0).any(dim=1)
