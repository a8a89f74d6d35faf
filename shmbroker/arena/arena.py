"""The arena: the ring allocator over a segment's memory, its blocks handed out as torch tensors whose death releases them.

A1  A block is released when the last tensor (or array, or buffer) that views it has died; never before.
A2  Releasing never takes a lock: it may happen at any moment, in any thread, in the middle of a garbage collection.
A3  A tensor that lies in a block is found again by its address, also through views of views, and is never copied (empty tensors have no
    address: they are placed anew, which costs nothing to copy).
A4  When no block is free, placing waits for a release until its deadline, then names the oldest holders.
A5  A block that a call names (it has the block's ``hold``) is not released before the call lets go, whatever becomes of its tensors: one that
    is moved to other memory (``share_memory_()``, a multiprocessing queue) dies for its block while it lives on. Where a channel is closed over a
    call, that is when the worker has ended it, or has ended itself.

How the death of a tensor is noticed is told in :mod:`shmbroker.arena.leases`.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import heapq
import threading
import time
from collections.abc import Iterator
from sys import getrefcount
from typing import NamedTuple

import torch

from shmbroker.arena.leases import Leases, leases_over
from shmbroker.arena.ring import LARGE_BYTES, Extent, Occupancy, RingAllocator, largest_request
from shmbroker.arena.room import Room, room_for
from shmbroker.errors import ArenaBusy, ArenaFull, ArenaTooSmall, ChannelError
from shmbroker.memory.layout import ALIGNMENT
from shmbroker.memory.segment import Segment
from shmbroker.settings.schema import DEFAULTS

DEFAULT_PLACE_SECONDS = DEFAULTS.place_timeout
"""How long placing a block waits for a release. Long enough for a call in flight to end, short enough that a leak is told."""

RECHECK_SECONDS = 0.1
"""How long one wait for a release lasts at most: another thread that waits may have taken the news and left room over."""

OLDEST_SHOWN = 3

Placed = tuple[torch.Tensor, Extent]
"""A tensor in a fresh block, and the block."""

IDLE_BLOCKS = 32
"""Dead blocks kept for the next ones of their sizes, before all go back to the ring: a layer's worth of tensors, twice."""

_REENTERED = (
    "a finaliser (__del__ or a weak reference's callback) used the arena while this thread was placing a block in it: finalisers may let go of "
    "tensors, not place or look for them"
)


_CLOSED = "the client is closed: its arena places no more tensors"


def _from_the_end(block: Extent) -> int:
    return -block.offset


_nobodys = Extent(0, 0)
_UNHELD = getrefcount(_nobodys.hold)
"""What is counted for a block's ``hold`` that no call has."""


class Location(NamedTuple):
    """Where a tensor lies: offset of its first element in the segment, and the block around it with its generation."""

    offset: int
    generation: int
    block: Extent


class Picture(NamedTuple):
    """What an arena looks like at a moment, for the segment's header, in its order."""

    held_bytes: int
    held_blocks: int
    high_water_bytes: int
    largest_free_bytes: int
    """Of what the ring has free; blocks that have just died and wait for the next of their size come on top."""
    placed_blocks: int
    waits: int
    full: int
    copied_bytes: int
    cursor: int
    blocks: tuple[tuple[int, int, int], ...]
    """Offset, bytes, and when it was placed (ns), in order of address: the oldest and the largest."""

    def words(self) -> tuple[int, ...]:
        """As numbers in a row."""
        return (*self[:-1], len(self.blocks), *[number for block in self.blocks for number in block])


class Arena:
    """Blocks of one segment as tensors. Thread-safe."""

    # What compiled calls work on too has slots.
    __slots__ = ("__dict__", "__weakref__", "_busy", "_idle", "_idle_count", "_leases", "_named", "_ring", "blocks")

    def __init__(self, segment: Segment) -> None:
        geometry = segment.geometry
        address = torch.frombuffer(segment.map, dtype=torch.uint8).data_ptr()
        self._set_up(geometry.arena_offset, geometry.arena_bytes, address, leases_over(segment.map))

    def _set_up(self, offset: int, nbytes: int, address: int, leases: Leases) -> None:
        """For any memory: ``address`` is where offset 0 lies."""
        self.nbytes = nbytes
        self._offset = offset
        self.address = address
        self._first_address = self.address + self._offset
        self._end_address = self._first_address + self.nbytes
        self.end = offset + nbytes
        """Offset behind its last byte."""
        self._ring = RingAllocator(self._offset, self.nbytes)
        self._lock = threading.RLock()
        self._busy = False
        """The lock's holder is in the midst of a change. The garbage collector may run a finaliser there, in the same thread: a lock that cannot
        be taken twice would make it wait for itself."""
        self.blocks: dict[int, Extent] = {}
        """By offset. A tensor that begins where a block does lies in it: the block cannot be another one's meanwhile."""
        self._idle: dict[int, list[Extent]] = {}
        """Blocks that have died and were not given back to the ring yet, by their size, the first in the arena last: the next of that size is placed
        there, in one step. Calls that are made again and again so find the same blocks each time, whatever order their tensors died in."""
        self._idle_count = 0
        self._named: list[Extent] = []
        """Blocks whose last tensor has died while a call names them."""
        self.waits = 0
        """How often a block had to be waited for."""
        self.full = 0
        """How often in vain."""
        self.copied_bytes = 0
        """What :meth:`copy_in` has copied."""
        self._leases: Leases | None = leases

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, timeout: float = DEFAULT_PLACE_SECONDS) -> torch.Tensor:
        """A tensor in a fresh block, values undefined, strides contiguous.

        Raises :class:`ArenaFull` when nothing was released within ``timeout`` seconds, :class:`ArenaTooSmall` at once when the
        arena could never hold it, :class:`BadInput` for a shape or dtype that cannot be carried.
        """
        return self.place(room_for(shape, dtype), timeout)[0]

    def place(self, room: Room, timeout: float = DEFAULT_PLACE_SECONDS, *, waited: float = 0.0) -> Placed:
        """A tensor in a fresh block, and the block. Raises as :meth:`empty`.

        ``waited``: seconds that the caller has waited for this block already, and has counted as a wait.
        """
        return self.place_now(room) or self._place_later(room, timeout, waited)

    def place_now(self, room: Room) -> Placed | None:
        """:meth:`place` where there is room at this moment, else None."""
        with self._lock:
            if self._busy:
                raise ArenaBusy(_REENTERED)
            leases = self._leases
            if leases is None:
                raise ChannelError(_CLOSED)
            self._busy = True
            try:
                block = self._idle_block(leases, room.nbytes) or self._ring.place(room.nbytes)
                if block is None:
                    self._settle(leases)
                    block = self._ring.place(room.nbytes)
                    if block is None:
                        return None
                offset = block.offset
                # fault: before block placed
                tensor = leases.tensor(room, offset, block)
                self.blocks[offset] = block
                # fault: after block placed
            finally:
                self._busy = False
        if room.as_integers:
            tensor = tensor.view(room.dtype)
        return tensor, block

    def _place_later(self, room: Room, timeout: float, waited: float) -> Placed:
        self.check_size(room)
        if not waited:
            self.count_wait()
        begun = time.monotonic()
        until = begun + timeout
        if timeout > 0:
            gc.collect()  # tensors in reference cycles (an exception's traceback, most often) die only here
        while True:
            placed = self.place_now(room)
            if placed is not None:
                return placed
            left = until - time.monotonic()
            if left <= 0:
                with self._lock:
                    self.full += 1
                raise ArenaFull(self._complaint(room.nbytes, waited + time.monotonic() - begun))
            leases = self._leases
            if leases is not None:
                leases.wait(min(left, RECHECK_SECONDS))

    def count_wait(self) -> None:
        """There was no room, and somebody will wait for it."""
        with self._lock:
            self.waits += 1

    def check_size(self, room: Room) -> None:
        """Raise :class:`ArenaTooSmall` when the arena could never hold it."""
        if largest_request(room.nbytes) > self.nbytes:
            raise ArenaTooSmall(
                f"a tensor of {room.nbytes} bytes cannot lie in an arena of {self.nbytes} bytes: it must measure at least "
                f"{largest_request(room.nbytes)}; raise --arena (or connect(arena=...))"
            )

    def copy_in(self, tensor: torch.Tensor, timeout: float = DEFAULT_PLACE_SECONDS) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in a fresh block: the one copy that a tensor from outside costs."""
        inside = self.place(room_for(tensor.shape, tensor.dtype), timeout)[0]
        inside.copy_(tensor.detach() if tensor.requires_grad else tensor)
        with self._lock:
            self.copied_bytes += inside.nbytes
        return inside

    def find(self, tensor: torch.Tensor) -> Location | None:
        """Where ``tensor`` lies, or None when it does not lie in a block of this arena (A3).

        One that torch shows with another sign than its bytes have (a conjugate, ``imag`` of one) is taken for one that lies elsewhere.
        """
        if tensor.is_neg() or tensor.is_conj():
            return None
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # a sparse tensor has no one place
            return None
        if not self._first_address <= address < self._end_address:
            return None
        offset = address - self.address
        # The storage of most tensors starts with the block; one made from a slice of an array is searched for.
        block = self.blocks.get(offset - int(tensor.storage_offset()) * tensor.element_size())
        if block is None:
            block = self._around(offset)
        return None if block is None else Location(offset, block.generation, block)

    def _around(self, offset: int) -> Extent | None:
        """The block that ``offset`` lies in: the large ones by bisection, a small one by each place where it may begin (R7)."""
        with self._alone():
            blocks, large = self.blocks, self._ring.large
            at = bisect.bisect_right(large, offset) - 1
            block = blocks.get(large[at]) if at >= 0 else None
            if block is not None and offset < block.offset + block.nbytes:
                return block
            nearest = offset - offset % ALIGNMENT
            for start in range(nearest, max(nearest - LARGE_BYTES, -1), -ALIGNMENT):
                block = blocks.get(start)
                if block is not None:
                    return block if offset < start + block.nbytes else None
            return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            if self._busy:
                raise ArenaBusy(_REENTERED)
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _idle_block(self, leases: Leases, nbytes: int) -> Extent | None:
        """A block of exactly ``nbytes`` bytes that has died, placed again; None when there is none.

        Calls of the same kinds, one after the other, so use the same few blocks: their memory is in the cache, and the worker knows them.
        """
        idle = self._idle
        while (block := leases.pop()) is not None:
            self._lay_by(block)
        if self._named:
            self._lay_by_named()
        fitting = idle.get(nbytes)
        if fitting:
            self._idle_count -= 1
            block = fitting.pop()
            self._ring.place_again(block)
            return block
        if self._idle_count > IDLE_BLOCKS:
            self._settle(leases)
        return None

    def _lay_by(self, block: Extent) -> None:
        """Keep a block that has died for the next of its size, unless a call names it still."""
        if getrefcount(block.hold) != _UNHELD:
            self._named.append(block)
            return
        same = self._idle.get(block.nbytes)
        if same is None:
            self._idle[block.nbytes] = [block]
        else:
            bisect.insort(same, block, key=_from_the_end)
        self._idle_count += 1

    def _lay_by_named(self) -> None:
        """Look again for those that no call names any more."""
        named, self._named = self._named, []
        for block in named:
            self._lay_by(block)

    def _settle(self, leases: Leases) -> None:
        """Give the ring back all that has died, and that no call names."""
        while (block := leases.pop()) is not None:
            self._lay_by(block)
        self._lay_by_named()
        for blocks in self._idle.values():
            for block in blocks:
                self._release(block)
        self._idle.clear()
        self._idle_count = 0

    def _release(self, block: Extent) -> None:
        # fault: before block freed
        del self.blocks[block.offset]
        self._ring.release(block)
        # fault: after block freed

    def _complaint(self, nbytes: int, waited: float) -> str:
        with self._alone():
            figures = self._ring.occupancy()
            now = time.monotonic()
            oldest = "; ".join(
                [f"{block.nbytes} bytes at {block.offset}, held {now - block.placed_at:.1f} s" for block in self._ring.oldest(OLDEST_SHOWN)]
            )
        return (
            f"{nbytes} bytes asked, {figures.free_bytes} free (largest extent {figures.largest_free_bytes} of {self.nbytes}) and not "
            f"enough released within {waited:.2f} s; {figures.blocks} blocks held, oldest: {oldest or 'none'}; let go of tensors that are no longer "
            "needed, or raise --arena (connect(arena=...))"
        )

    def close(self) -> None:
        """Let go of the memory; living tensors keep it until the last of them dies."""
        with self._alone():
            self.blocks = {}
            self._leases = None

    def picture(self, most: int) -> Picture:
        """What lies where, ``most`` blocks at most: half of them the oldest, half the largest of the others.

        Gives nothing back to the ring, so that calls go on with the blocks that they know.
        """
        with self._alone():
            leases = self._leases
            while leases is not None and (block := leases.pop()) is not None:
                self._lay_by(block)
            dead = {block.offset for blocks in self._idle.values() for block in blocks}
            held: list[tuple[float, int, int]] = []
            largest = 0
            for extent in self._ring.extents():
                if not extent.held:
                    largest = max(largest, extent.nbytes)
                elif extent.offset not in dead:
                    held.append((extent.placed_at, extent.nbytes, extent.offset))
            ring = self._ring
            figures = ring.high_water_bytes, largest, ring.placed, self.waits, self.full, self.copied_bytes, ring.cursor
        held_bytes = sum([nbytes for _, nbytes, _ in held])
        held_blocks = len(held)
        if held_blocks > most:
            held.sort()
            oldest, rest = held[: most // 2], held[most // 2 :]
            held = oldest + heapq.nlargest(most - len(oldest), rest, key=lambda block: block[1])
        blocks = sorted([(offset, nbytes, int(placed_at * 1e9)) for placed_at, nbytes, offset in held])
        return Picture(held_bytes, held_blocks, *figures, tuple(blocks))

    def occupancy(self) -> Occupancy:
        """Figures of the moment."""
        with self._alone():
            if self._leases is not None:
                self._settle(self._leases)
            return self._ring.occupancy()
