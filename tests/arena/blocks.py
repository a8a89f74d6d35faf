"""Blocks in a small arena: placed, counted, filling it whole, and kept by garbage alone."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

from shmbroker.arena.arena import Arena, Location, Room
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry

UNIT = layout.ALIGNMENT
GEOMETRY = Geometry(arena_bytes=16 * layout.PAGE, channel_count=1, depth=1)

# The segment of a fixture serves all examples of a property; each example has an arena of its own over it.
property_settings = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Cycle:
    """Garbage that only the collector finds, with a tensor in it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.me = self


def placed(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Location]:
    tensor, block = arena.place(Room(shape, dtype))
    return tensor, Location(block.offset, block.generation, block)


def blocks_in(arena: Arena) -> int:
    return arena.occupancy().blocks


def fill(arena: Arena, units: int) -> list[torch.Tensor]:
    """The whole arena in blocks of ``units`` alignments."""
    return [arena.empty((units * UNIT,), torch.uint8) for _ in range(arena.nbytes // (units * UNIT))]
