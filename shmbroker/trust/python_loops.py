"""The loops of the trust modes in Python: the reference of ``_loops.c``, which gives the same bits, and what is used where that is not there.

Integers wrap modulo 2^32 and 2^64, as torch's and NumPy's do. Arguments are as in :mod:`shmbroker.trust.loops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

_LANES = 8
_CONSTANTS = np.array([0x61707865, 0x3320646E, 0x79622D32, 0x6B206574], dtype=np.uint32)
_QUARTERS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15), (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_BLOCK_BYTES = 64

_EXACT_BITS = 53
"""Of an integer, that a float64 holds exactly."""

_WEIGHT_BITS = 14
"""Of the largest weights."""

COLUMNS_AT_ONCE = 1 << (_EXACT_BITS - 31 - (_WEIGHT_BITS - 1))
"""How many products of any 32-bit integer and a weight can be summed in float64 with no rounding."""


class FloatProduct(NamedTuple):
    """A result of floating-point numbers, ``[rows, out]``, and what it is checked by."""

    shared: torch.Tensor
    """float32, which others may write to."""
    own: torch.Tensor
    """As shared, private: what is checked, and used."""
    vectors: torch.Tensor
    """float32 ``[out, 8]``."""
    bias: torch.Tensor | None
    """float32 ``[out]``."""


def keystream(key: bytes | memoryview, nonce: bytes, counter: int, out: torch.Tensor) -> None:
    """ChaCha20 (RFC 8439), from block ``counter`` on, all blocks at once."""
    nbytes = out.nbytes
    blocks = -(-nbytes // _BLOCK_BYTES)
    state = np.empty((16, blocks), dtype=np.uint32)
    state[:4] = _CONSTANTS[:, None]
    state[4:12] = np.frombuffer(key, dtype="<u4")[:, None]
    state[12] = counter + np.arange(blocks, dtype=np.uint32)
    state[13:] = np.frombuffer(nonce, dtype="<u4")[:, None]
    words = state.copy()
    for _ in range(10):
        for a, b, c, d in _QUARTERS:
            for first, second, third, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                words[first] += words[second]
                mixed = words[third] ^ words[first]
                words[third] = (mixed << np.uint32(bits)) | (mixed >> np.uint32(32 - bits))
    words += state
    stream = np.ascontiguousarray(words.T).view(np.uint8).reshape(-1)
    out.view(-1).view(torch.uint8).numpy()[:] = stream[:nbytes]


def seal(
    x: torch.Tensor,
    limit: float,
    pads: torch.Tensor | None,
    out: torch.Tensor,
    inputs: torch.Tensor,
    sums: torch.Tensor,
    scales: torch.Tensor,
) -> bool:
    """Rows to integers with the first sum of the check."""
    wide = x.numpy().astype(np.float64)
    rows, columns = wide.shape
    squares = np.zeros((rows, -(-columns // _LANES) * _LANES))
    with np.errstate(over="ignore", invalid="ignore"):
        squares[:, :columns] = wide * wide
        lanes = np.add.accumulate(squares.reshape(rows, -1, _LANES), axis=1)[:, -1] if columns else np.zeros((rows, _LANES))
        a, b, c, d = (lanes[:, lane] + lanes[:, lane + 4] for lane in range(4))
        totals = (a + b) + (c + d)
    if not np.isfinite(totals).all():
        return False
    positive = totals > 0
    found = np.where(positive, limit / np.sqrt(np.where(positive, totals, 1.0)), 1.0)
    scales.copy_(torch.from_numpy(found))
    values = torch.from_numpy(np.rint(wide * found[:, None])).to(torch.int64)
    sums.copy_(values @ inputs.t())
    masked = values.to(torch.int32)
    if pads is not None:
        masked += pads
        pads.zero_()
    out.copy_(masked)
    return True


def open_rows(
    shared: torch.Tensor,
    pads: torch.Tensor | None,
    outputs: torch.Tensor,
    expected: torch.Tensor,
    row_scales: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> int:
    """Copied once, unmasked, checked, and back to floating point."""
    copied = shared.clone()
    if pads is not None:
        copied -= pads
        pads.zero_()
    sums = copied.to(torch.int64) @ outputs.to(torch.int64).t()
    result = copied.to(torch.float32) * (scales * (1.0 / row_scales).to(torch.float32)[:, None])
    out.copy_(result if bias is None else result + bias)
    wrong = (sums != expected).any(dim=1).nonzero()
    return int(wrong[0]) if len(wrong) else -1


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """As products of float64, over so many columns at once that each is exact."""
    wide = x.to(torch.float64)
    total = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.int64)
    for first in range(0, x.shape[1], COLUMNS_AT_ONCE):
        part = weight[:, first : first + COLUMNS_AT_ONCE].to(torch.float64)
        total += (wide[:, first : first + COLUMNS_AT_ONCE] @ part.t()).to(torch.int64)
    out.copy_(total.to(torch.int32))


def residues(x: torch.Tensor, inputs: torch.Tensor, products: Sequence[FloatProduct], factor: float, tolerances: torch.Tensor) -> int:
    """Copied once, and checked with eight vectors."""
    wide = x.to(torch.float64)
    sums = wide @ inputs
    for product in products:
        product.own.copy_(product.shared)
        off = product.own.to(torch.float64)
        sums -= (off if product.bias is None else off - product.bias.to(torch.float64)) @ product.vectors.to(torch.float64)
    if not torch.isfinite(wide).all():
        return -2
    tolerances.copy_(wide.norm(dim=1) * factor)
    wrong = (~(sums.abs().amax(dim=1) <= tolerances)).nonzero()
    return int(wrong[0]) if len(wrong) else -1
