"""The plan of a model: what its forward pass would cost at each split, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from shmbroker.models import ModelSource
from shmbroker.settings import mib
from tee_worker.planning.own_part import own_part
from tee_worker.planning.places import places
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure, structure_of
from tee_worker.planning.traffic import generation_traffic

if TYPE_CHECKING:
    from rich.console import RenderableType


class PlannedSplit(msgspec.Struct, frozen=True):
    """What one split costs."""

    split: str
    calls: int
    sent_bytes: int
    received_bytes: int
    largest_bytes: int
    largest: str
    """Op and tensor of the largest block."""
    calls_by_op: dict[str, int]


class Plan(msgspec.Struct, frozen=True):
    """The plan of one model."""

    model: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    splits: tuple[PlannedSplit, ...]
    places: tuple[tuple[str, str], ...]
    """Module by module, for the split that was asked for: its name, and where it runs."""

    def render(self) -> RenderableType:
        """As tables for a terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for one in self.splits:
            table.add_column(one.split, justify="right")
        rows = (
            ("calls", [str(one.calls) for one in self.splits]),
            ("sent", [mib(one.sent_bytes) for one in self.splits]),
            ("received", [mib(one.received_bytes) for one in self.splits]),
            ("largest block", [mib(one.largest_bytes) for one in self.splits]),
        )
        for label, cells in rows:
            table.add_row(label, *cells)
        for op in dict.fromkeys(op for one in self.splits for op in one.calls_by_op):
            table.add_row(f"  {op}", *[str(one.calls_by_op.get(op, 0)) for one in self.splits])
        if not self.places:
            return table
        places = Table(box=None, pad_edge=False, header_style="bold")
        places.add_column("module")
        places.add_column("runs on")
        for name, where in self.places:
            places.add_row(name, where)
        return Group(table, "", places)


def plan(source: ModelSource, dtype: torch.dtype, *, prompt_tokens: int, new_tokens: int, split: Splits | None) -> Plan:
    """Plan a greedy generation of ``new_tokens`` after ``prompt_tokens`` at every split the model allows, and ``split``; places for ``split``."""
    model = own_part(source, dtype)
    structure = structure_of(model)
    rows = []
    for one in _allowed(structure, split):
        traffic = generation_traffic(structure, one, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        assert traffic.largest is not None
        assert traffic.largest_tensor is not None
        rows.append(
            PlannedSplit(
                split=str(one),
                calls=traffic.calls,
                sent_bytes=traffic.sent_bytes,
                received_bytes=traffic.received_bytes,
                largest_bytes=traffic.largest_tensor.nbytes,
                largest=f"{traffic.largest.op} {traffic.largest_tensor}",
                calls_by_op=traffic.calls_by_op,
            )
        )
    return Plan(
        model=source.name,
        dtype=str(dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        splits=tuple(rows),
        places=() if split is None else tuple(places(model, structure, split)),
    )


def _allowed(structure: Structure, also: Splits | None) -> list[Splits]:
    found = [Splits.named(split) for split in Split]
    if not structure.layers:
        found = [split for split in found if split.uniform is not Split.LAYER and split.uniform is not Split.BLOCK]
    if None in structure.halves:
        found = [split for split in found if split.uniform is not Split.BLOCK]
    return found if also is None or also in found else [*found, also]
