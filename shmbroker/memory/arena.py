"""The arena: the ring allocator over a segment's memory, its blocks handed out as torch tensors whose death releases them.

A1  A block is released when the last tensor (or array, or buffer) that views it has died; never before.
A2  Releasing never takes a lock: it may happen at any moment, in any thread, in the middle of a garbage collection.
A3  A tensor that lies in a block is found again by its address, also through views of views, and is never copied (empty tensors have no
    address: they are placed anew, which costs nothing to copy).
A4  When no block is free, placing waits for a release until its deadline, then names the oldest holders.

The lease is a weak reference to the buffer object that the torch storage keeps alive, not to the tensor: views of views share the storage, and
NumPy arrays made from them keep it too. That object is the NumPy array that the tensor was made from, or, for dtypes that NumPy lacks, a slice
of a memoryview. (An array does not keep the memoryview that it was made from, only what lies under that.)
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import math
import mmap
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from shmbroker.errors import ArenaBusy, ArenaFull, ArenaTooSmall
from shmbroker.memory.layout import ALIGNMENT, round_up
from shmbroker.memory.ring import Extent, Occupancy, RingAllocator, largest_request
from shmbroker.memory.segment import Segment
from shmbroker.memory.spec import NUMPY_OF, check_carried, contiguous_strides

DEFAULT_PLACE_SECONDS = 5.0
"""How long placing a block waits for a release. Long enough for a call in flight to end, short enough that a leak is told."""

RECHECK_SECONDS = 0.1
"""How long one wait for a release lasts at most: another thread that waits may have taken the news and left room over."""

OLDEST_SHOWN = 3

_from_numpy = torch.from_numpy
_ndarray = np.ndarray

_REENTERED = (
    "a finaliser (__del__ or a weak reference's callback) used the arena while this thread was placing a block in it: finalisers may let go of "
    "tensors, not place or look for them"
)


class Lease(weakref.ref[object]):
    """Tells the arena when the buffer under a block's tensors has died."""

    __slots__ = ("block",)

    block: Extent


class Room:
    """What a block must hold: shape and dtype of a tensor, and all that follows from them. Raises :class:`BadInput` for what is not carried."""

    __slots__ = ("count", "dtype", "nbytes", "numpy_dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check_carried(shape, dtype)
        self.shape = shape
        self.dtype = dtype
        self.count = math.prod(shape)
        self.nbytes = round_up(self.count * dtype.itemsize or 1, ALIGNMENT)
        self.numpy_dtype = NUMPY_OF.get(dtype)
        """Tensors are made from arrays where NumPy has the dtype: half the time of the way through ``torch.frombuffer``."""


class Place(NamedTuple):
    """Where a tensor lies: offset of its first element in the segment, and the generation of the block around it."""

    offset: int
    generation: int


class Arena:
    """Blocks of one segment as tensors. Thread-safe."""

    def __init__(self, segment: Segment) -> None:
        geometry = segment.geometry
        self.nbytes = geometry.arena_bytes
        self._offset = geometry.arena_offset
        self._map: mmap.mmap | None = segment.map
        self._memory = memoryview(segment.map)
        self.address: int = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._first_address = self.address + self._offset
        self._end_address = self._first_address + self.nbytes
        self._ring = RingAllocator(self._offset, self.nbytes)
        self._lock = threading.RLock()
        self._busy = False
        """The lock's holder is in the midst of a change. The garbage collector may run a finaliser there, in the same thread: a lock that cannot
        be taken twice would make it wait for itself."""
        self.leases: dict[int, Lease] = {}
        """By offset of their block. A tensor that begins where a lease does lies in its block: the block cannot be another one's meanwhile."""
        self._dead: queue.SimpleQueue[Lease] = queue.SimpleQueue()
        # SimpleQueue.put is reentrant and is called straight by the weak reference: that is A2.
        self._bury = self._dead.put

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, timeout: float = DEFAULT_PLACE_SECONDS) -> torch.Tensor:
        """A tensor in a fresh block, values undefined, strides contiguous.

        Raises :class:`ArenaFull` when nothing was released within ``timeout`` seconds, :class:`ArenaTooSmall` at once when the
        arena could never hold it, :class:`BadInput` for a shape or dtype that cannot be carried.
        """
        return self.place(Room(shape, dtype), timeout)[0]

    def place(self, room: Room, timeout: float = DEFAULT_PLACE_SECONDS) -> tuple[torch.Tensor, int, int]:
        """A tensor in a fresh block, the block's offset in the segment, and its generation. Raises as :meth:`empty`."""
        nbytes = room.nbytes
        with self._lock:
            if self._busy:
                raise ArenaBusy(_REENTERED)
            self._busy = True
            try:
                block = None if self._dead.empty() else self._settle(nbytes)
                if block is None:
                    block = self._ring.place(nbytes)
                    if block is None:
                        block = self._wait_for_room(nbytes, timeout)
                offset = block.offset
                anchor: object
                if room.numpy_dtype is not None:
                    anchor = array = _ndarray(room.shape, room.numpy_dtype, self._map, offset)
                    tensor = _from_numpy(array)
                else:
                    anchor, tensor = self._view_without_numpy(room, offset)
                lease = Lease(anchor, self._bury)
                lease.block = block
                self.leases[offset] = lease
            finally:
                self._busy = False
        return tensor, offset, block.generation

    def _view_without_numpy(self, room: Room, offset: int) -> tuple[memoryview, torch.Tensor]:
        buffer = self._memory[offset : offset + room.nbytes]
        if room.count == 0:
            return buffer, torch.frombuffer(buffer, dtype=torch.uint8).view(room.dtype).as_strided(
                room.shape, contiguous_strides(room.shape)
            )
        return buffer, torch.frombuffer(buffer, dtype=room.dtype, count=room.count).view(room.shape)

    def copy_in(self, tensor: torch.Tensor, timeout: float = DEFAULT_PLACE_SECONDS) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in a fresh block: the one copy that a tensor from outside costs."""
        inside = self.empty(tuple(tensor.shape), tensor.dtype, timeout)
        inside.copy_(tensor.detach())
        return inside

    def find(self, tensor: torch.Tensor) -> Place | None:
        """Where ``tensor`` lies, or None when it does not lie in a block of this arena (A3).

        One that torch shows with another sign than its bytes have (``imag`` of a conjugate) is taken for one that lies elsewhere.
        """
        if tensor.is_neg():
            return None
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # a sparse tensor has no one place
            return None
        if not self._first_address <= address < self._end_address:
            return None
        offset = address - self.address
        # The storage of most tensors starts with the block; one made from a slice of an array is searched for.
        lease = self.leases.get(offset - int(tensor.storage_offset()) * tensor.element_size())
        if lease is None:
            lease = self._around(offset)
        return None if lease is None else Place(offset, lease.block.generation)

    def _around(self, offset: int) -> Lease | None:
        with self._alone():
            starts = sorted(self.leases)
            at = bisect.bisect_right(starts, offset) - 1
            if at < 0:
                return None
            lease = self.leases[starts[at]]
            return lease if offset < lease.block.offset + lease.block.nbytes else None

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

    @contextlib.contextmanager
    def _let_others(self) -> Iterator[None]:
        """Within :meth:`place`: let others at the arena for the length of a block."""
        self._busy = False
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._busy = True

    def _settle(self, nbytes: int = 0) -> Extent | None:
        """Give the ring back what has died since the last time, but for one block of exactly ``nbytes``: that is placed again and returned.

        Calls of one kind, one after the other, so use the same few blocks, whose memory is in the cache.
        """
        dead = self._dead
        again: Extent | None = None
        while not dead.empty():
            try:
                lease = dead.get_nowait()
            except queue.Empty:  # a thread that waits for room was faster
                break
            block = lease.block
            if again is None and block.nbytes == nbytes:
                del self.leases[block.offset]
                self._ring.place_again(block)
                again = block
            else:
                self._release(lease)
        return again

    def _release(self, lease: Lease) -> None:
        block = lease.block
        self.leases.pop(block.offset, None)
        self._ring.release(block)

    def _wait_for_room(self, nbytes: int, timeout: float) -> Extent:
        if largest_request(nbytes) > self.nbytes:
            raise ArenaTooSmall(
                f"a tensor of {nbytes} bytes cannot lie in an arena of {self.nbytes} bytes: it must measure at least "
                f"{largest_request(nbytes)}; raise --arena (or connect(arena=...))"
            )
        until = time.monotonic() + timeout
        if timeout > 0:
            with self._let_others():  # what dies now may run code that places blocks
                gc.collect()  # tensors in reference cycles (an exception's traceback, most often) die only here
        while True:
            self._settle()
            block = self._ring.place(nbytes)
            if block is not None:
                return block
            left = until - time.monotonic()
            if left <= 0:
                raise ArenaFull(self._complaint(nbytes, timeout))
            lease = None
            with self._let_others(), contextlib.suppress(queue.Empty):
                lease = self._dead.get(timeout=min(left, RECHECK_SECONDS))
            if lease is not None:
                self._release(lease)

    def _complaint(self, nbytes: int, timeout: float) -> str:
        figures = self._ring.occupancy()
        now = time.monotonic()
        oldest = "; ".join(
            f"{block.nbytes} bytes at {block.offset}, held {now - block.placed_at:.1f} s" for block in self._ring.oldest(OLDEST_SHOWN)
        )
        return (
            f"{nbytes} bytes asked, {figures.free_bytes} free (largest extent {figures.largest_free_bytes} of {self.nbytes}) and nothing "
            f"released within {timeout:g} s; {figures.blocks} blocks held, oldest: {oldest or 'none'}; let go of tensors that are no longer "
            "needed, or raise --arena (connect(arena=...))"
        )

    def close(self) -> None:
        """Let go of the memory; living tensors keep it until the last of them dies."""
        with self._alone():
            self.leases = {}
            self._memory = memoryview(b"")
            self._map = None

    def occupancy(self) -> Occupancy:
        """Figures of the moment."""
        with self._alone():
            self._settle()
            return self._ring.occupancy()
