"""A client's arena on a device: one allocation of its own, exported once, in which the ring allocator places blocks as in shared memory.

Never blocks of torch's caching allocator: a handle exposes the whole allocation, and torch's counts of who uses one are lost with a process that
is killed. The driver frees the allocation when its client has ended and no worker has it open any more.
"""

from __future__ import annotations

import contextlib
import queue
import weakref

import torch

from shmbroker.errors import CudaRefused
from shmbroker.memory.arena import Arena
from shmbroker.memory.cuda_runtime import Cuda
from shmbroker.memory.ring import Extent
from shmbroker.memory.room import Room
from shmbroker.memory.spec import contiguous_strides


class Allocation:
    """Device memory that is given back when the last tensor over it has died, and its arena was closed."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.cuda = cuda
        self.pointer = cuda.allocate(nbytes)
        self._end = weakref.finalize(self, _free, cuda, self.pointer)
        self._end.atexit = False  # the driver frees what a process leaves


def _free(cuda: Cuda, pointer: int) -> None:
    with contextlib.suppress(CudaRefused):
        cuda.free(pointer)


class _Lease(weakref.ref[object]):
    """Tells that the memory under a block's tensors has died."""

    __slots__ = ("block",)

    block: Extent


class DeviceLeases:
    """:class:`~shmbroker.memory.leases.Leases` of blocks on a device."""

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation
        self._living: dict[int, _Lease] = {}
        self._dead: queue.SimpleQueue[_Lease] = queue.SimpleQueue()
        self._bury = self._dead.put

    def tensor(self, room: Room, offset: int, block: Extent) -> torch.Tensor:
        """A tensor over ``block``, whose death gives the block back. Of bytes where ``room.as_bytes``."""
        allocation = self._allocation
        flat, memory = allocation.cuda.tensor(allocation.pointer + offset, room.nbytes, allocation)
        lease = _Lease(memory, self._bury)
        lease.block = block
        self._living[offset] = lease
        del memory
        return flat.view(room.dtype).as_strided(room.shape, contiguous_strides(room.shape))

    def pop(self) -> Extent | None:
        """A block whose last tensor has died, the longest dead first, or None."""
        try:
            lease = self._dead.get_nowait()
        except queue.Empty:
            return None
        if self._living.get(lease.block.offset) is lease:
            del self._living[lease.block.offset]
        return lease.block

    def wait(self, seconds: float) -> None:
        """Wait until a lease dies, for so many seconds at most."""
        with contextlib.suppress(queue.Empty):
            self._dead.put(self._dead.get(timeout=seconds))


class DeviceArena(Arena):
    """Made by :meth:`Client.device_arena`. Thread-safe. ``handle`` names it to workers."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        allocation = Allocation(cuda, nbytes)
        self.handle = cuda.export(allocation.pointer)
        self._cuda = cuda
        self._set_up(0, nbytes, allocation.pointer, DeviceLeases(allocation))

    def written(self) -> None:
        """Wait until what the current stream writes is there."""
        self._cuda.synchronize()
