"""The plan of a model: what its forward pass would cost at each split, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from shmbroker.models import ModelSource
from shmbroker.settings import MIB
from tee_worker.planning.arena_size import arena_bytes
from tee_worker.planning.own_part import own_part
from tee_worker.planning.places import folded, places
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure, structure_of
from tee_worker.planning.traffic import generation_traffic

if TYPE_CHECKING:
    from rich.console import RenderableType


COLUMNS = 80
"""Of a terminal that shows a plan."""

LONGEST_NAME = 56
"""Of a module that is kept in one piece there, beside where it runs."""


class PlannedSplit(msgspec.Struct, frozen=True):
    """What one split costs."""

    split: str
    calls: int
    sent_bytes: int
    received_bytes: int
    largest_bytes: int
    largest: str
    """Op and tensor of the largest block."""
    arena_bytes: int
    """What ``generate`` and ``serve`` ask for where no size is told."""
    calls_by_op: dict[str, int]


class Plan(msgspec.Struct, frozen=True):
    """The plan of one model."""

    model: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    pipeline: int
    splits: tuple[PlannedSplit, ...]
    places: tuple[tuple[str, str], ...]
    """Module by module, for the split that was asked for: its name, and where it runs."""
    layers: tuple[str, ...]
    """The names of the decoder layers."""

    def render(self) -> RenderableType:
        """As tables for a terminal; equal layers are one row of the second."""
        from rich.console import Group
        from rich.table import Table

        head = f"{self.model}, {self.dtype}"
        pipeline = f", in {self.pipeline} parts" if self.pipeline > 1 else ""
        what = f"What the TEE worker sends and receives, in MiB: {self.prompt_tokens} tokens and {self.new_tokens} new{pipeline}"
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for one in self.splits:
            table.add_column(one.split.replace(",", ",\n"), justify="right", no_wrap=True)
        rows = (
            ("calls", [str(one.calls) for one in self.splits]),
            ("sent", [_mib(one.sent_bytes) for one in self.splits]),
            ("received", [_mib(one.received_bytes) for one in self.splits]),
            ("largest block", [_mib(one.largest_bytes) for one in self.splits]),
            ("arena", [_enough_mib(one.arena_bytes) for one in self.splits]),
        )
        for label, cells in rows:
            table.add_row(label, *cells)
        for op in dict.fromkeys(op for one in self.splits for op in one.calls_by_op):
            table.add_row(f"  {op}", *[str(one.calls_by_op.get(op, 0)) for one in self.splits])
        foot = "arena: the shared memory that a run asks for where --arena is not given"
        if not self.places:
            return Group(head, what, table, foot)
        places = Table(box=None, pad_edge=False, header_style="bold")
        modules = list(folded(self.places, self.layers))
        places.add_column("module", overflow="fold", no_wrap=max(len(name) for name, _ in modules) <= LONGEST_NAME)
        places.add_column("runs on", overflow="fold")
        for name, where in modules:
            places.add_row(name, where)
        return Group(head, what, table, foot, "", places)


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f}"


def _enough_mib(nbytes: int) -> str:
    """Rounded up, so that it may be given as ``--arena``."""
    return f"{-(-10 * nbytes // MIB) / 10:.1f}"


def plan(source: ModelSource, dtype: torch.dtype, *, prompt_tokens: int, new_tokens: int, split: Splits | None, pipeline: int = 1) -> Plan:
    """Plan a greedy generation of ``new_tokens`` after ``prompt_tokens`` at every split the model allows, and ``split``; places for ``split``.

    ``pipeline``: parts of a pass on their way at once.
    """
    model = own_part(source, dtype)
    structure = structure_of(model)
    rows = []
    for one in _allowed(structure, split):
        traffic = generation_traffic(structure, one, prompt_tokens=prompt_tokens, new_tokens=new_tokens, pipeline=pipeline)
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
                arena_bytes=arena_bytes(None, traffic, pipeline),
                calls_by_op=traffic.calls_by_op,
            )
        )
    return Plan(
        model=source.name,
        dtype=str(dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        pipeline=pipeline,
        splits=tuple(rows),
        places=() if split is None else tuple(places(model, structure, split)),
        layers=structure.layers,
    )


def _allowed(structure: Structure, also: Splits | None) -> list[Splits]:
    found = [Splits.named(split) for split in Split]
    if not structure.layers:
        found = [split for split in found if split.uniform is not Split.LAYER and split.uniform is not Split.BLOCK]
    if None in structure.halves:
        found = [split for split in found if split.uniform is not Split.BLOCK]
    return found if also is None or also in found else [*found, also]
