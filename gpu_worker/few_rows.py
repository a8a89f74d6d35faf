"""Products of a few rows on the CPU, in blocks: the weight is read from memory once for all rows, and not packed before it is used.

torch's product of 8 rows takes as long as 2 to 6 of one row, and one of 2 rows as long as two: the library below it rearranges the whole weight first,
which costs what reading it does some times over. The same product as a batch of products with 16 outputs each takes as long as 2 of one row. Its bits
are the same on processors where that was seen; where they are not, or it takes longer, torch's is used. Both are found out by the first calls.
"""

from __future__ import annotations

import time

import torch

LEAST_ROWS, MOST_ROWS = 2, 16
"""With one row the weight is read once anyway, with more than 16 rearranging it pays."""

BLOCK = 16
"""Outputs, of each block. With 128 of them it takes up to a fifth longer."""

_clock = time.perf_counter

_Kind = tuple[int, int, bool]
"""Inputs, outputs, and whether there is a bias."""


class FewRows:
    """Products of a few rows: whether in blocks, is decided for each kind. Used by one thread at a time."""

    def __init__(self) -> None:
        self._faster: dict[_Kind, bool] = {}
        self._same_bits: dict[tuple[_Kind, int], bool] = {}
        """By the number of rows too."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """``out = x @ weight + bias``: x ``[n, in]``, weight ``[in, out]`` (transposed view), out ``[n, out]``."""
        rows, (inputs, outputs) = len(x), weight.shape
        known = x.dtype is torch.float32 and x.device.type == "cpu"
        if not LEAST_ROWS <= rows <= MOST_ROWS or not known or outputs % BLOCK or not weight.t().is_contiguous():
            whole(x, weight, bias, out)
            return
        kind = inputs, outputs, bias is not None
        same_bits = self._same_bits.get((kind, rows))
        if same_bits is None:
            self._find_out(kind, x, weight, bias, out)
            whole(x, weight, bias, out)
        elif same_bits and self._faster[kind]:
            in_blocks(x, weight, bias, out)
        else:
            whole(x, weight, bias, out)

    def _find_out(self, kind: _Kind, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        # Not on what the client gave: zeros would be the same anyhow, and it may change meanwhile.
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        one, other = torch.empty_like(out), torch.empty_like(out)
        if kind not in self._faster:
            times: dict[object, float] = {}
            for product in (whole, in_blocks, whole, in_blocks):
                begun = _clock()
                product(x, weight, bias, other)
                times[product] = min(times.get(product, float("inf")), _clock() - begun)
            self._faster[kind] = times[in_blocks] < times[whole]
        whole(x, weight, bias, one)
        in_blocks(x, weight, bias, other)
        self._same_bits[kind, len(x)] = torch.equal(one.view(torch.int32), other.view(torch.int32))


def whole(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """As torch does it."""
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """As a batch of products with :data:`BLOCK` outputs each."""
    rows, (inputs, outputs) = len(x), weight.shape
    blocks = outputs // BLOCK
    left = x.expand(blocks, rows, inputs)
    right = weight.t().view(blocks, BLOCK, inputs).transpose(1, 2)
    parts = torch.bmm(left, right) if bias is None else torch.baddbmm(bias.view(blocks, 1, BLOCK), left, right)
    out.view(rows, blocks, BLOCK).copy_(parts.transpose(0, 1))
