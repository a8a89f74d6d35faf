"""Leases in Python: tensors over blocks, and which blocks' last tensors have died.

The lease is a weak reference to the buffer object that the torch storage keeps alive, not to the tensor: views of views share the storage, and
NumPy arrays made from them keep it too. That object is the NumPy array that the tensor was made from, or, for dtypes that NumPy lacks, a slice
of a memoryview. (An array does not keep the memoryview that it was made from, only what lies under that.)

``_leases.c`` has the same compiled: there the lease is a DLPack capsule, and torch calls its deleter. :func:`leases_over` takes whichever there is.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Protocol

import torch
import torch.utils.dlpack

from shmbroker.arena.python_leases import PythonLeases
from shmbroker.arena.ring import Extent
from shmbroker.arena.room import Room
from shmbroker.memory import compiled

# What torch.utils.dlpack.from_dlpack does with a capsule, without its 200 ns of looking what it was given.
_from_dlpack: Callable[[object], torch.Tensor] = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)


class Leases(Protocol):
    """The leases of one arena. ``tensor`` and ``pop`` are called under the arena's lock."""

    def tensor(self, room: Room, offset: int, block: Extent) -> torch.Tensor:
        """A tensor over ``block``, whose death gives the block back."""

    def pop(self) -> Extent | None:
        """A block whose last tensor has died, the longest dead first, or None."""

    def wait(self, seconds: float) -> None:
        """Wait until a lease dies, for so many seconds at most."""


def leases_over(mapping: mmap.mmap) -> Leases:
    """Leases for blocks of ``mapping``: the compiled ones where they were built and are wanted, else those in Python."""
    if compiled.WANTED:
        try:
            from shmbroker.arena import _leases
        except ImportError:
            pass
        else:
            return _leases.Leases(mapping, _from_dlpack)
    return PythonLeases(mapping)
