"""The ring allocator: a cursor sweeps round an arena and places blocks. Knows numbers only, no memory, no tensors, no threads.

R1  Blocks never overlap, and lie inside the arena, aligned.
R2  Free extents and blocks together cover the arena exactly; no two free extents are neighbours (they coalesce at once).
R3  Used first-in-first-out it is a ring buffer: placing and releasing cost O(1). (A request that fails has walked over all extents. A block
    that is released just behind the cursor is placed again first: its memory is still in the cache.)
R4  A block that is still held when the cursor meets it is stepped over; it is never waited for and never moved.
R5  A request fails only when no free extent is large enough.
R6  Every block has a generation of its own, in order of placing (32 bits, never 0).
R7  ``large`` tells the offsets of all blocks of at least LARGE_BYTES, in order: who looks for the block around an address has few places to look.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator
from dataclasses import dataclass

from shmbroker.memory.layout import ALIGNMENT, round_up

LARGE_BYTES = 64 * 1024
"""Smaller blocks are found by looking at every place where one may begin: 255 at most. Larger ones are so few that a list of them is short."""

_GENERATIONS = (1 << 32) - 1
_clock = time.monotonic


class Extent:
    """A run of bytes, free or held; a held one is a block. Linked to its neighbours in order of address."""

    __slots__ = ("after", "before", "generation", "held", "hold", "nbytes", "offset", "placed_at")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.held = False
        self.hold = object()
        """Calls that name the block keep a reference to this: as long as any does, the block is theirs (A5)."""
        self.generation = 0
        self.placed_at = 0.0
        self.before: Extent | None = None
        self.after: Extent | None = None


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What an arena holds at a moment, bytes."""

    total_bytes: int
    held_bytes: int
    largest_free_bytes: int
    blocks: int
    placed: int
    """Blocks placed since the start."""

    @property
    def free_bytes(self) -> int:
        """Bytes in no block."""
        return self.total_bytes - self.held_bytes


class RingAllocator:
    """Places blocks in ``[offset, offset + nbytes)``. Not thread-safe: the arena holds the lock."""

    __slots__ = ("_cursor", "_first", "block_count", "held_bytes", "high_water_bytes", "large", "nbytes", "offset", "placed")

    def __init__(self, offset: int, nbytes: int) -> None:
        if nbytes <= 0 or nbytes % ALIGNMENT or offset % ALIGNMENT:
            raise ValueError(f"a ring needs offset and size in multiples of {ALIGNMENT}, not {offset} and {nbytes}")
        self.offset = offset
        self.nbytes = nbytes
        self.held_bytes = 0
        self.block_count = 0
        self.high_water_bytes = 0
        """The most bytes that were ever placed at once."""
        self.placed = 0
        self.large: list[int] = []
        self._first = Extent(offset, nbytes)
        self._cursor = self._first

    def place(self, nbytes: int) -> Extent | None:
        """A block of at least ``nbytes`` bytes at or after the cursor, round the ring once; None when none fits (R5)."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT or ALIGNMENT
        extent = self._cursor
        if extent.held or extent.nbytes < size:
            found = self._step(size)
            if found is None:
                return None
            extent = found
        spare = extent.nbytes - size
        if spare:
            block = Extent(extent.offset, size)
            block.before, block.after = extent.before, extent
            if extent.before is None:
                self._first = block
            else:
                extent.before.after = block
            extent.before = block
            extent.offset += size
            extent.nbytes = spare
            self._cursor = extent
        else:
            block = extent
            self._cursor = extent.after or self._first
        block.held = True
        self.place_again(block)
        if size >= LARGE_BYTES:
            bisect.insort(self.large, block.offset)
        self.held_bytes = held = self.held_bytes + size
        if held > self.high_water_bytes:
            self.high_water_bytes = held
        self.block_count += 1
        return block

    def _step(self, size: int) -> Extent | None:
        """From the cursor once round the ring, over held blocks and free extents that are too small (R4)."""
        start = self._cursor
        extent = start.after or self._first
        while extent is not start:
            if not extent.held and extent.nbytes >= size:
                return extent
            extent = extent.after or self._first
        return None

    def place_again(self, block: Extent) -> None:
        """Release a held block and place one of the same size in its place, in one step and for a quarter of the cost."""
        if not block.held:
            raise ValueError(f"the block at {block.offset} was released before")
        self.placed = placed = self.placed + 1
        block.generation = (placed - 1) % _GENERATIONS + 1
        block.placed_at = _clock()

    def release(self, block: Extent) -> None:
        """Make ``block`` free and coalesce it with its neighbours. Raises ValueError when it is not held."""
        if not block.held:
            raise ValueError(f"the block at {block.offset} was released twice")
        block.held = False
        if block.nbytes >= LARGE_BYTES:
            del self.large[bisect.bisect_left(self.large, block.offset)]
        self.held_bytes -= block.nbytes
        self.block_count -= 1
        after = block.after
        if after is not None and not after.held:
            self._absorb(block, after)
        before = block.before
        if before is not None and not before.held:
            self._absorb(before, block)

    def _absorb(self, extent: Extent, gone: Extent) -> None:
        extent.nbytes += gone.nbytes
        extent.after = gone.after
        if gone.after is not None:
            gone.after.before = extent
        if self._cursor is gone:
            self._cursor = extent

    @property
    def cursor(self) -> int:
        """Where the next block is looked for first."""
        return self._cursor.offset

    def extents(self) -> Iterator[Extent]:
        """All extents in order of address."""
        extent: Extent | None = self._first
        while extent is not None:
            yield extent
            extent = extent.after

    def occupancy(self) -> Occupancy:
        """Figures of the moment; walks all extents."""
        largest = max((extent.nbytes for extent in self.extents() if not extent.held), default=0)
        return Occupancy(self.nbytes, self.held_bytes, largest, self.block_count, self.placed)

    def oldest(self, count: int) -> list[Extent]:
        """The ``count`` blocks that were placed longest ago."""
        return sorted((extent for extent in self.extents() if extent.held), key=lambda extent: extent.placed_at)[:count]


def largest_request(nbytes: int) -> int:
    """What an arena must at least measure to hold one block of ``nbytes`` bytes."""
    return round_up(max(nbytes, 1), ALIGNMENT)
