"""Pinning: clients' segments registered with the CUDA driver while they are mapped, so that copies run at the bus's speed beside everything else.

Where the driver refuses (confidential computing answers 801, a container or a limit of locked memory something else), copies are pageable: slower, and
nothing else changes. The first refusal of a kind is logged.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable

import torch

from shmbroker.arena.cuda_runtime import Cuda
from shmbroker.errors import CudaRefused
from shmbroker.worker.device_memory import nothing

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 30
"""Registered at once at most: drivers have refused larger ones."""


class Pinning:
    """Of one device. ``cuda``: None where there is no driver to ask, for the reason ``why``. Used by one thread at a time."""

    def __init__(self, cuda: Cuda | None, why: str = "", piece_bytes: int = PIECE_BYTES) -> None:
        self._cuda = cuda
        self._piece_bytes = piece_bytes
        self._told: set[str] = set()
        self.pinned = 0
        """Segments that were registered."""
        self.pageable = 0
        """Segments that were refused."""
        if cuda is None:
            self._tell(why)

    def probe(self) -> bool:
        """Whether a page can be registered at all. Never assumed: tried."""
        if self._cuda is None:
            return False
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            address = torch.frombuffer(page, dtype=torch.uint8).data_ptr()
            try:
                self._cuda.register(address, mmap.PAGESIZE)
                self._cuda.unregister(address)
            except CudaRefused as error:
                self._tell(str(error))
                return False
        return True

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Register memory in pieces; returns what unregisters it, once. All or nothing: half a segment's speed would be a riddle."""
        cuda = self._cuda
        if cuda is None or nbytes <= 0:
            self.pageable += nbytes > 0
            return nothing
        done: list[int] = []

        def unpin() -> None:
            while done:
                try:
                    cuda.unregister(done.pop())
                except CudaRefused as error:  # a context that is broken already unpins nothing
                    log.warning("unpinning: %s", error)

        for start in range(0, nbytes, self._piece_bytes):
            try:
                cuda.register(address + start, min(self._piece_bytes, nbytes - start))
            except CudaRefused as error:
                unpin()
                self.pageable += 1
                self._tell(f"{error}, {nbytes} bytes")
                return nothing
            done.append(address + start)
        self.pinned += 1
        return unpin

    def _tell(self, why: str) -> None:
        kind = why.partition(",")[0]
        if kind not in self._told:
            self._told.add(kind)
            log.warning("clients' memory cannot be pinned: copies are pageable, and slower (%s)", why)
