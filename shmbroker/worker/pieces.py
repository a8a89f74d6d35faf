"""Row-wise calls in pieces: how many rows of a call are run at once, so that other clients need not wait for all of them.

A piece is run by the same function as the whole, on views ``[1, rows, width]`` of the same tensors. What the CPU computes is the same, bit by bit, as
long as no piece has fewer than some 4 rows (a product with one row is another routine): none here has fewer than :data:`LEAST_ROWS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

PIECE_NS = 5_000_000
"""How long a piece is to take."""

LEAST_ROWS = 64
"""Of a piece. The weight is read anew for each: with 64 rows a product of 2048 x 2048 takes 1.2 times as long in all, with 16 it would take 2.3 times."""

STEP_ROWS = 16
"""Pieces have a multiple of it, but for the last one."""

Prepare = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Callable[[], object]]
"""``prepare(inputs, outputs)`` returns what runs the op on these tensors."""


class PieceSize:
    """How many rows of one bound op take about :data:`PIECE_NS`, as far as was measured. Used by whoever has the turn."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows = LEAST_ROWS

    def next(self, left: int) -> int:
        """Rows of the next piece, where ``left`` are left."""
        rows = self.rows
        return left if left < rows + LEAST_ROWS else rows

    def measured(self, rows: int, nanoseconds: int) -> None:
        """``rows`` took so long: the next piece is larger or smaller, at most twice or half as large."""
        wanted = rows * PIECE_NS // max(1, nanoseconds)
        if rows < self.rows:  # the rest of a call tells only that pieces are too large
            wanted = min(wanted, self.rows)
        wanted = min(max(wanted, self.rows // 2), self.rows * 2)
        self.rows = max(LEAST_ROWS, wanted - wanted % STEP_ROWS)


class Pieces:
    """A call of a row-wise op that may be run in pieces. ``rows``: of the whole call."""

    __slots__ = ("_inputs", "_leading", "_outputs", "_prepare", "rows", "size")

    def __init__(
        self, prepare: Prepare, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], leading: torch.Size, size: PieceSize
    ) -> None:
        self.rows = math.prod(leading)
        self.size = size
        self._prepare = prepare
        self._inputs = inputs
        self._outputs = outputs
        self._leading = len(leading)

    def run(self, first: int, end: int) -> None:
        """Run these rows, counted from 0, without ``end``."""
        self._prepare([self._part(one, first, end) for one in self._inputs], [self._part(one, first, end) for one in self._outputs])()

    def _part(self, tensor: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return tensor.view(1, self.rows, *tensor.shape[self._leading :])[:, first:end]


def pieces_of(prepare: Prepare, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], size: PieceSize) -> Pieces | None:
    """The call of a row-wise op as pieces; None where it is too small for two, or its tensors do not lie row by row.

    The rows of an output are all its dimensions but the last; an input has the same ones, with or without a last one of its own.
    """
    leading = outputs[0].shape[:-1] if outputs else torch.Size()
    if math.prod(leading) < 2 * LEAST_ROWS:
        return None
    if any([one.shape[:-1] != leading for one in outputs]) or any([leading not in (one.shape, one.shape[:-1]) for one in inputs]):
        return None
    if not all([tensor.is_contiguous() for tensor in (*inputs, *outputs)]):
        return None
    return Pieces(prepare, inputs, outputs, leading, size)
