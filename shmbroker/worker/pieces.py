"""Long calls in pieces, so that other clients need not wait for the whole: row by row, or by tiles that the op itself knows of.

What is written is the same as by the whole call, bit by bit, as long as the op computes a row (or a tile) alike whatever else is computed with it. The
products of torch do on the CPU, but for less than some 4 rows, which are another routine's: no piece here has fewer than :data:`LEAST_ROWS`.
A product with one column is another routine's too, and its bits depend on the number of rows: an op that has such is not to be registered as row-wise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

PIECE_NS = 5_000_000
"""How long a piece is to take."""

LEAST_ROWS = 64
"""Of a piece. A product's weight is read anew for each: with 16 rows one of 2048 x 2048 takes 2.3 times as long in all, with 64 rows 1.2 times."""

STEP_ROWS = 16
"""Pieces have a multiple of it, but for the last one."""

Prepare = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Callable[[], object]]
"""``prepare(inputs, outputs)`` returns what runs the op on these tensors."""

Tile = Callable[[], object]
"""Computes a part of a call's outputs that no other tile does."""

RunUnits = Callable[[int, int], None]
"""``run(first, end)`` runs these units of a call: rows, or tiles."""


class PieceSize:
    """How many units of one bound op take about :data:`PIECE_NS`, as far as was measured. Used by whoever has the turn."""

    __slots__ = ("_least", "_step", "units")

    def __init__(self, least: int = LEAST_ROWS, step: int = STEP_ROWS) -> None:
        self._least = least
        self._step = step
        self.units = least

    def next(self, left: int) -> int:
        """Units of the next piece, where ``left`` are left."""
        units = self.units
        return left if left < units + self._least else units

    def measured(self, units: int, nanoseconds: int) -> None:
        """``units`` took so long: the next piece is larger or smaller, at most twice or half as large."""
        wanted = round(units * PIECE_NS / max(1, nanoseconds))
        if units < self.units:  # the rest of a call tells only that pieces are too large
            wanted = min(wanted, self.units)
        wanted = min(max(wanted, self.units // 2), self.units * 2)
        self.units = max(self._least, wanted - wanted % self._step)


class Pieces(Protocol):
    """A call that may be run in pieces."""

    size: PieceSize

    def begin(self) -> tuple[int, RunUnits]:
        """How many units the call has, and what runs them, to be let go of when it is over."""


class RowPieces:
    """A call of an op whose rows do not depend on each other."""

    def __init__(
        self, prepare: Prepare, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], leading: torch.Size, size: PieceSize
    ) -> None:
        self.size = size
        self._rows = math.prod(leading)
        self._prepare = prepare
        self._inputs = inputs
        self._outputs = outputs
        self._leading = len(leading)

    def begin(self) -> tuple[int, RunUnits]:
        """A unit is a row."""
        return self._rows, self._run

    def _run(self, first: int, end: int) -> None:
        self._prepare([self._part(one, first, end) for one in self._inputs], [self._part(one, first, end) for one in self._outputs])()

    def _part(self, tensor: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return tensor.view(1, self._rows, *tensor.shape[self._leading :])[:, first:end]


class TilePieces:
    """A call of an op that knows its tiles. ``tiles``: makes them, on the call's tensors."""

    def __init__(self, tiles: Callable[[], Sequence[Tile]], size: PieceSize) -> None:
        self.size = size
        self._tiles = tiles

    def begin(self) -> tuple[int, RunUnits]:
        """A unit is a tile."""
        tiles = self._tiles()

        def run(first: int, end: int) -> None:
            for tile in tiles[first:end]:
                tile()

        return len(tiles), run


def is_long(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether a call has rows for two pieces: all dimensions but the last are rows."""
    return bool(outputs) and math.prod(outputs[0].shape[:-1]) >= 2 * LEAST_ROWS


def rows_side_by_side(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> torch.Size | None:
    """The dimensions that are a call's rows, of all its tensors; None where they do not lie row by row.

    The rows of an output are all its dimensions but the last; an input has the same ones, with or without a last one of its own.
    """
    leading = outputs[0].shape[:-1]
    if any([one.shape[:-1] != leading for one in outputs]) or any([leading not in (one.shape, one.shape[:-1]) for one in inputs]):
        return None
    return leading if all([tensor.is_contiguous() for tensor in (*inputs, *outputs)]) else None


def pieces_by_row(prepare: Prepare, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], size: PieceSize) -> Pieces | None:
    """The call of a row-wise op as pieces; None where its tensors do not lie row by row."""
    leading = rows_side_by_side(inputs, outputs)
    if leading is None:
        return None
    return RowPieces(prepare, inputs, outputs, leading, size)
