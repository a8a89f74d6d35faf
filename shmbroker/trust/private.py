"""Memory that is this process's alone: wiped in children, in no core dump, never on a disk.

P1  A child finds zeros, however it was made: by ``fork``, ``clone`` or a library's thread (MADV_WIPEONFORK).
P2  It is in no core dump (MADV_DONTDUMP).
P3  It is never written to swap: locked, or there is no swap.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch

from shmbroker.errors import BadInput, PadsLost

_WIPE_ON_FORK = 18
"""MADV_WIPEONFORK of linux/mman.h, Linux 4.14."""

SWAPS = Path("/proc/swaps")

_libc = ctypes.CDLL(None, use_errno=True)


class PrivateMemory:
    """Anonymous memory of ``nbytes``, as a tensor of bytes. Raises :class:`BadInput` where P1 to P3 cannot be had."""

    def __init__(self, nbytes: int) -> None:
        try:
            self._map = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BadInput(f"{nbytes} bytes for pads cannot be had ({error.strerror}): make fewer ahead (--pads)") from None
        try:
            self._map.madvise(_WIPE_ON_FORK)
            self._map.madvise(mmap.MADV_DONTDUMP)
        except OSError as error:
            raise BadInput(f"this kernel cannot keep memory from children ({error.strerror}): pads need Linux 4.14 or later") from None
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self._lock()

    def _lock(self) -> None:
        if lock_pages(self.bytes.data_ptr(), len(self._map)):
            return
        if swap_in_use():
            raise BadInput(
                f"{len(self._map)} bytes for pads cannot be locked ({os.strerror(ctypes.get_errno())}), and this machine swaps to a disk: raise the "
                "limit (ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit), make fewer pads ahead (--pads), or switch swap off"
            )

    def tensor(self, dtype: torch.dtype, offset: int, *shape: int) -> torch.Tensor:
        """A tensor in it, ``offset`` bytes from its start."""
        count = 1
        for size in shape:
            count *= size
        return self.bytes[offset : offset + count * dtype.itemsize].view(dtype).view(shape)

    def draw(self) -> None:
        """Random bytes, from the kernel straight into it: no file is opened for them, and no copy lies elsewhere. Raises :class:`PadsLost`."""
        if _libc.getrandom(ctypes.c_void_p(self.bytes.data_ptr()), ctypes.c_size_t(len(self.bytes)), 0) != len(self.bytes):
            raise PadsLost(f"the system's random source gives no key ({os.strerror(ctypes.get_errno())})")

    def wipe(self) -> None:
        """Zeros."""
        self.bytes.zero_()


def lock_pages(address: int, nbytes: int) -> bool:
    """Keep pages in memory (mlock); False where the kernel does not, with its reason in errno."""
    return not _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


def swap_in_use() -> bool:
    """Whether the kernel may write memory to a disk. Where it does not tell, it may."""
    try:
        return len(SWAPS.read_text().splitlines()) > 1
    except OSError:
        return True
