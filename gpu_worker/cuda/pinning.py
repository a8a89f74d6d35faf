"""Pinning: clients' segments registered with the CUDA driver while they are mapped, so that copies run at the bus's speed beside everything else.

Where the driver refuses (confidential computing answers 801, a container or a limit of locked memory something else), copies are pageable: slower, and
nothing else changes. The first refusal of a kind is warned of; the log counts, with each segment, how many are pinned and how many are not.
"""

from __future__ import annotations

import functools
import logging
import mmap
from collections.abc import Callable

import torch

from shmbroker.arena import Cuda
from shmbroker.errors import CudaRefused

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 30
"""Registered at once at most: drivers have refused larger ones."""


class Pinning:
    """Of one device. ``cuda``: None where there is no driver to ask, for the reason ``why``.

    Used by one thread at a time; what :meth:`pin` returns may be called by another.
    """

    def __init__(self, cuda: Cuda | None, why: str = "", piece_bytes: int = PIECE_BYTES) -> None:
        self._cuda = cuda
        self._piece_bytes = piece_bytes
        self._warned: set[str] = set()
        """Kinds of refusal that were logged."""
        self.pinned = 0
        """Segments that were registered; the log tells how many with each segment."""
        self.pageable = 0
        """Segments that were refused; likewise."""
        if cuda is None:
            self._warn(why)

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
                self._warn(str(error))
                return False
        return True

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Register memory in pieces; returns what unregisters it, once. All or nothing: half a segment's speed would be a riddle."""
        pieces = self._registered(address, nbytes)
        if pieces:
            self.pinned += 1
        elif nbytes > 0:
            self.pageable += 1
        log.info(
            "a segment of %d bytes is %s; so far %d pinned, %d pageable",
            nbytes,
            "pinned" if pieces else "pageable",
            self.pinned,
            self.pageable,
        )
        return functools.partial(self._unregister, pieces)

    def _registered(self, address: int, nbytes: int) -> list[int]:
        """The addresses of the pieces that were registered; none where one was refused."""
        pieces: list[int] = []
        if self._cuda is None:
            return pieces
        for start in range(0, nbytes, self._piece_bytes):
            try:
                self._cuda.register(address + start, min(self._piece_bytes, nbytes - start))
            except CudaRefused as error:
                self._unregister(pieces)
                self._warn(f"{error}, {nbytes} bytes")
                break
            pieces.append(address + start)
        return pieces

    def _unregister(self, pieces: list[int]) -> None:
        while pieces:
            assert self._cuda is not None
            try:
                self._cuda.unregister(pieces.pop())
            except CudaRefused as error:  # a context that is broken already unpins nothing
                log.warning("unpinning: %s", error)

    def _warn(self, why: str) -> None:
        """Once for each kind of refusal."""
        kind = why.partition(",")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("clients' memory cannot be pinned: copies are pageable, and slower (%s)", why)
