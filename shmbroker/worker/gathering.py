"""Calls of one op, computed together: their rows are gathered in the worker's own memory, run as one call, and given back to each.

The result of a row may differ in the last bit from the one that it has alone: a product of one row is another routine's than one of several.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from shmbroker.worker.ops import BoundOp
from shmbroker.worker.pieces import rows_side_by_side
from shmbroker.worker.prepared_call import PreparedCall

MOST_ROWS = 8
"""Of one call: one with more is better run by itself, and is no decode step."""

MOST_ROW_BYTES = 2 << 20
"""Of a row's inputs and outputs: a worker keeps room for the rows of all clients."""

WORTH = 0.95
"""Of the time that calls take one by one: together they must take no more."""

TRY_AGAIN = 64
"""What did not pay is tried again after so many times: it was measured beside whatever else the machine did."""

_NEW = 0.2
"""The part that one measurement has in what is known."""

_LOOKS = 3
"""Measurements of which the least counts, before anything is known: the first one may have touched its memory, or chosen a routine, for the first time."""

_Form = tuple[torch.dtype, torch.Size]


@dataclass
class Costs:
    """What so many rows take, nanoseconds: by what was measured so far. Of all ops with the same shapes."""

    by_rows: dict[int, float] = field(default_factory=dict)
    _looks: dict[int, int] = field(default_factory=dict)
    _refused: int = 0

    def measured(self, rows: int, nanoseconds: float) -> None:
        """So many rows took so long."""
        known, looks = self.by_rows.get(rows, math.inf), self._looks.get(rows, 0)
        if looks < _LOOKS:
            self._looks[rows] = looks + 1
            self.by_rows[rows] = min(known, nanoseconds)
        else:
            self.by_rows[rows] = known + _NEW * (min(nanoseconds, 4 * known) - known)

    def pays(self, rows: Sequence[int]) -> bool:
        """Whether calls of so many rows each take less time together. What is not known is to be found out: alone first, then together."""
        if len(rows) < 2:
            return False
        apart = 0.0
        for one in rows:
            alone = self.by_rows.get(one)
            if alone is None:
                return False
            apart += alone
        total = sum(rows)
        return self._looks.get(total, 0) < _LOOKS or self.by_rows[total] <= WORTH * apart

    def is_worth_trying(self, rows: Sequence[int]) -> bool:
        """:meth:`pays`, or it is time to see whether it still does not."""
        if self.pays(rows):
            return True
        if len(rows) < 2 or any(one not in self.by_rows for one in rows):
            return False
        self._refused += 1
        return self._refused % TRY_AGAIN == 0


@dataclass(frozen=True, slots=True)
class Form:
    """What calls have in common that may be computed together, and how many rows this one has."""

    key: Hashable
    shapes: Hashable
    """Of ops that cost the same."""
    rows: int


def form_of(prepared: PreparedCall) -> Form | None:
    """The form of a call; None for one that is run by itself."""
    op, inputs, outputs = prepared.op, prepared.inputs, prepared.outputs
    if op.batch_key is None or not prepared.repeatable or not outputs:
        return None
    leading = rows_side_by_side(inputs, outputs)
    if leading is None or any([tensor.device.type != "cpu" for tensor in (*inputs, *outputs)]):
        return None
    rows, dims = math.prod(leading), len(leading)
    if not 0 < rows <= MOST_ROWS or sum([tensor.nbytes for tensor in (*inputs, *outputs)]) > rows * MOST_ROW_BYTES:
        return None
    shapes = op.name, prepared.single, _forms(inputs, dims), _forms(outputs, dims)
    return Form((op.batch_key, shapes), shapes, rows)


def _forms(tensors: Sequence[torch.Tensor], dims: int) -> tuple[_Form, ...]:
    return tuple([(tensor.dtype, tensor.shape[dims:]) for tensor in tensors])


class Gatherer:
    """Runs calls of one form together. ``prepared``: one of them. Used by whoever has the turn; holds nothing of any client."""

    __slots__ = ("__weakref__", "_buffers", "_inputs", "_most", "_op", "_outputs", "_ready", "_single", "costs", "following", "gap_ns")

    def __init__(self, prepared: PreparedCall, costs: Costs) -> None:
        dims = len(prepared.outputs[0].shape) - 1
        self._op: BoundOp = prepared.op
        self._single = prepared.single
        self._inputs = _forms(prepared.inputs, dims)
        self._outputs = _forms(prepared.outputs, dims)
        self._most = 0
        self._buffers: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._ready: dict[int, tuple[list[torch.Tensor], list[torch.Tensor], Callable[[], object]]] = {}
        """By rows."""
        self.costs = costs
        self.gap_ns = 0.0
        """What clients take themselves before they call this op."""
        self.following: weakref.ref[Gatherer] | None = None
        """What clients called next, the last time."""

    def run(self, calls: Sequence[tuple[PreparedCall, int]]) -> None:
        """Run these calls, each with its number of rows. Raises what the op raises; no output of any is of use then."""
        inputs, outputs, run = self._prepared(sum([rows for _, rows in calls]))
        for index, room in enumerate(inputs):
            tail = self._inputs[index][1]
            torch.cat([call.inputs[index].view(rows, *tail) for call, rows in calls], out=room[0])
        run()
        for index, results in enumerate(outputs):
            tail, first = self._outputs[index][1], 0
            for call, rows in calls:
                call.outputs[index].view(rows, *tail).copy_(results[0, first : first + rows])
                first += rows

    def _prepared(self, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor], Callable[[], object]]:
        ready = self._ready.get(rows)
        if ready is None:
            if rows > self._most:
                most = 1 << (rows - 1).bit_length()
                buffers = self._rooms(self._inputs, most), self._rooms(self._outputs, most)  # may fail: then all is as it was
                self._ready.clear()
                self._buffers, self._most = buffers, most
            inputs, outputs = ([one[:, :rows] for one in rooms] for rooms in self._buffers)
            ready = self._ready[rows] = inputs, outputs, self._op.prepare(inputs, outputs, {}, single=self._single)
        return ready

    @staticmethod
    def _rooms(forms: Sequence[_Form], rows: int) -> list[torch.Tensor]:
        return [torch.zeros((1, rows, *tail), dtype=dtype) for dtype, tail in forms]
