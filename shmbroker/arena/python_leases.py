"""Leases in Python: weak references to the buffers under a block's tensors."""

from __future__ import annotations

import contextlib
import mmap
import queue
import weakref
from collections import deque

import numpy as np
import torch
import torch.utils.dlpack

from shmbroker.arena.ring import Extent
from shmbroker.arena.room import Room
from shmbroker.arena.spec import contiguous_strides

_from_numpy = torch.from_numpy


_ndarray = np.ndarray


class _Lease(weakref.ref[object]):
    """Tells that the buffer under a block's tensors has died."""

    __slots__ = ("block",)

    block: Extent


class WeakLeases:
    """The books of leases that are weak references to what lies under a block's tensors, whatever memory that is."""

    def __init__(self) -> None:
        self._living: dict[int, _Lease] = {}
        """By offset of their block: a weak reference that is dead itself tells nothing."""
        self._dead: queue.SimpleQueue[_Lease] = queue.SimpleQueue()
        self._met: deque[_Lease] = deque()
        """Taken from the dead by who waited for one: older than all that are still there."""
        # SimpleQueue.put is reentrant and is called straight by the weak reference: that is A2.
        self._bury = self._dead.put

    def lend(self, anchor: object, offset: int, block: Extent) -> None:
        """``block`` is given back when ``anchor`` dies."""
        lease = _Lease(anchor, self._bury)
        lease.block = block
        self._living[offset] = lease

    def pop(self) -> Extent | None:
        """A block whose last tensor has died, the longest dead first, or None."""
        if not self._met and self._dead.empty():
            return None
        try:
            lease = self._met.popleft() if self._met else self._dead.get_nowait()
        except queue.Empty:
            return None
        if self._living.get(lease.block.offset) is lease:
            del self._living[lease.block.offset]
        return lease.block

    def wait(self, seconds: float) -> None:
        """Wait until a lease dies, for so many seconds at most."""
        if not self._met:
            with contextlib.suppress(queue.Empty):
                self._met.append(self._dead.get(timeout=seconds))


class PythonLeases(WeakLeases):
    """:class:`Leases` over mapped memory."""

    def __init__(self, mapping: mmap.mmap) -> None:
        super().__init__()
        self._map = mapping
        self._memory = memoryview(mapping)

    def tensor(self, room: Room, offset: int, block: Extent) -> torch.Tensor:
        """A tensor over ``block``, whose death gives the block back. Raises ValueError where it does not lie in the mapping."""
        anchor: object
        if offset < 0:
            raise ValueError(f"a tensor at {offset} does not lie in {len(self._map)} bytes")  # NumPy would make it
        try:
            if room.numpy_dtype is not None:
                anchor = array = _ndarray(room.shape, room.numpy_dtype, self._map, offset)
                tensor = _from_numpy(array)
            else:
                anchor, tensor = self._without_numpy(room, offset)
        except (TypeError, OverflowError):
            if not isinstance(offset, int):
                raise
            raise ValueError(f"a tensor at {offset} does not lie in {len(self._map)} bytes") from None
        self.lend(anchor, offset, block)
        return tensor

    def _without_numpy(self, room: Room, offset: int) -> tuple[memoryview, torch.Tensor]:
        buffer = self._memory[offset : offset + room.nbytes]
        if room.count == 0:
            flat = torch.frombuffer(buffer, dtype=torch.uint8).view(room.dtype)
            return buffer, flat.as_strided(room.shape, contiguous_strides(room.shape))
        return buffer, torch.frombuffer(buffer, dtype=room.dtype, count=room.count).view(room.shape)
