"""A client's arena on a device: one allocation of its own, exported once, in which the ring allocator places blocks as in shared memory.

Never blocks of torch's caching allocator: a handle exposes the whole allocation, and torch's counts of who uses one are lost with a process that
is killed. The driver frees the allocation when its client has ended and no worker has it open any more.
"""

from __future__ import annotations

import contextlib
import weakref

import torch

from shmbroker.arena.arena import Arena
from shmbroker.arena.cuda_runtime import Cuda
from shmbroker.arena.python_leases import WeakLeases
from shmbroker.arena.ring import Extent
from shmbroker.arena.room import Room
from shmbroker.arena.spec import contiguous_strides
from shmbroker.errors import CudaRefused


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


class DeviceLeases(WeakLeases):
    """:class:`~shmbroker.arena.leases.Leases` of blocks on a device."""

    def __init__(self, allocation: Allocation) -> None:
        super().__init__()
        self._allocation = allocation

    def tensor(self, room: Room, offset: int, block: Extent) -> torch.Tensor:
        """A tensor over ``block``, whose death gives the block back."""
        allocation = self._allocation
        flat, memory = allocation.cuda.tensor(allocation.pointer + offset, room.nbytes, allocation)
        self.lend(memory, offset, block)
        del memory
        return flat.view(room.dtype).as_strided(room.shape, contiguous_strides(room.shape))


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
