"""Pads: uniform numbers that hide a row, with what the weight makes of them. Each is used for one row, once, and then is gone.

A pad of a weight ``[out, in]`` is r, int32 ``[in]``, and u = r W, int32 ``[out]``, both modulo 2^32: the worker is given x + r, and u is taken off what it
gives back.

P4  A pad is handed out once: under the lock, with a number of its own, 64 bits, that only grows.
P5  There is one copy of it, in private memory (P1 to P3): r is wiped as the masked row is written, u as the result is opened; a pad
    that is dropped unused is wiped too.
P6  A child of this process has none, and cannot make any: it raises ``PadsLost``.
P7  An empty pool makes pads while its caller waits. Nothing is ever sent without one.
P8  Every batch has a key of its own from the system's random source, in private memory too, and wiped when it was used.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

from shmbroker.errors import PadsLost
from shmbroker.trust.loops import KEY_BYTES, NONCE_BYTES, keystream
from shmbroker.trust.private import PrivateMemory

Product = Callable[[torch.Tensor, torch.Tensor], None]
"""Given r ``[n, in]``, writes u ``[n, out]``."""

_ALIVE = 0x5AFE
_WORD = 8
_CHUNK_BYTES = 1 << 30
"""Of one key stream: block numbers have 32 bits."""


def fill_random(out: torch.Tensor) -> None:
    """Fill a contiguous tensor with uniform bits: ChaCha20 under keys from the system's source."""
    flat = out.view(-1).view(torch.uint8)
    memory = PrivateMemory(KEY_BYTES)
    key = memory.bytes.numpy().data
    for first in range(0, flat.numel(), _CHUNK_BYTES):
        memory.draw()
        keystream(key, bytes(NONCE_BYTES), 0, flat[first : first + _CHUNK_BYTES])
        memory.wipe()


class Alive:
    """A word that a child of this process does not find (P6)."""

    def __init__(self) -> None:
        self._memory = PrivateMemory(_WORD)
        self._word = self._memory.tensor(torch.int64, 0, 1)
        self._word[0] = _ALIVE

    def check(self) -> None:
        """Raise :class:`PadsLost` in a child, and after the end."""
        if self._word.item() != _ALIVE:
            raise PadsLost(
                "this process has no pads: they are the process's that opened the session, and a fork of it, or an ended session, has none; open one here"
            )

    def end(self) -> None:
        """Nobody is alive any more."""
        self._memory.wipe()


class Batch:
    """Pads that were made together."""

    def __init__(self, count: int, columns: int, outputs: int) -> None:
        self.count = count
        self.taken = 0
        self.released = 0
        self._memory = PrivateMemory(4 * count * (columns + outputs))
        self.masks = self._memory.tensor(torch.int32, 0, count, columns)
        """r."""
        self.products = self._memory.tensor(torch.int32, 4 * count * columns, count, outputs)
        """u."""

    def wipe(self) -> None:
        """Of all that were not handed out: the others are their takers', who wipe them."""
        self.masks[self.taken :].zero_()
        self.products[self.taken :].zero_()


class Pad:
    """Some rows of one batch, handed out: to be used by whoever took them, and then released."""

    __slots__ = ("_batch", "_masks", "_pool", "_used", "first", "products", "rows", "serial")

    def __init__(self, pool: Pads, batch: Batch, rows: int, serial: int) -> None:
        self._pool = pool
        self._batch = batch
        self.first = batch.taken
        self.rows = rows
        self.serial = serial
        """Of the first row; the others follow."""
        self._used = False
        self._masks = batch.masks[self.first : self.first + rows]
        self.products = batch.products[self.first : self.first + rows]

    @property
    def masks(self) -> torch.Tensor:
        """r, to look at, ``[rows, in]``."""
        return self._masks

    def use(self) -> torch.Tensor:
        """r, to mask rows with. Raises :class:`PadsLost` the second time: what it hid would be seen."""
        if self._used:
            self._pool.reused += 1
            raise PadsLost("a pad was to be used a second time, and was not: tell us")
        self._used = True
        return self._masks

    def release(self) -> None:
        """Wipe what is left of it. Its memory may be used for other pads from then on."""
        self._masks.zero_()
        self.products.zero_()
        self._pool.give_back(self._batch, self.rows)


class Pads:
    """The pads of one weight. Thread-safe."""

    def __init__(self, alive: Alive, columns: int, outputs: int, product: Product, target: int, batch: int) -> None:
        """``target``: how many to have ready; ``batch``: how many are made at once ahead of time."""
        self._alive = alive
        self._columns = columns
        self._outputs = outputs
        self._product = product
        self.target = target
        self.batch = batch
        self._lock = threading.Lock()
        self.ready: deque[Batch] = deque()
        """With pads to hand out, the longest made first."""
        self._spare: list[Batch] = []
        self._stock = 0
        self._serial = 0
        self._closed = False
        self.reused = 0
        """Attempts to use a pad twice."""
        self.waited = 0
        """Rows whose pads were made while their caller waited."""

    @property
    def taken(self) -> int:
        """Rows so far, which is the number that the next one gets."""
        return self._serial

    @property
    def missing(self) -> int:
        """How many fewer than the target are ready."""
        return self.target - self._stock

    def take(self, rows: int) -> list[Pad]:
        """Pads for ``rows`` rows, to be used in this order, each once; whoever takes them releases them. Raises :class:`PadsLost`."""
        self._alive.check()
        with self._lock:
            found = list(self._pop(rows))
            self._stock -= sum(pad.rows for pad in found)
        left = rows - sum(pad.rows for pad in found)
        if left:
            try:
                batch = self._make(left)
            except BaseException:
                for pad in found:
                    pad.release()
                raise
            with self._lock:
                found.append(self._hand_out(batch, left))
                self.waited += left if self._outputs else 0  # without products there is nothing to wait for
        return found

    def make_ahead(self) -> None:
        """One batch more. Raises :class:`PadsLost`."""
        batch = self._make(self.batch)
        with self._lock:
            if self._closed:
                batch.wipe()
                return
            self.ready.append(batch)
            self._stock += batch.count

    def _pop(self, rows: int) -> Iterator[Pad]:
        while rows and self.ready:
            batch = self.ready[0]
            count = min(rows, batch.count - batch.taken)
            rows -= count
            yield self._hand_out(batch, count)
            if batch.taken == batch.count:
                self.ready.popleft()

    def _hand_out(self, batch: Batch, rows: int) -> Pad:
        pad = Pad(self, batch, rows, self._serial)
        batch.taken += rows
        self._serial += rows
        return pad

    def _make(self, count: int) -> Batch:
        self._alive.check()
        with self._lock:
            batch = self._spare.pop() if count == self.batch and self._spare else None
        if batch is None:
            batch = Batch(count, self._columns, self._outputs)
        batch.taken = batch.released = 0
        fill_random(batch.masks)
        self._product(batch.masks, batch.products)
        self._alive.check()  # a fork in the midst of it has wiped what was made before
        return batch

    def give_back(self, batch: Batch, rows: int) -> None:
        """For :class:`Pad`: rows of ``batch`` are wiped."""
        with self._lock:
            batch.released += rows
            if not self._closed and batch.released == batch.count == self.batch and len(self._spare) * self.batch < self.target:
                self._spare.append(batch)

    def close(self) -> None:
        """Wipe all that are ready, and keep none any more."""
        with self._lock:
            self._closed = True
            for batch in self.ready:
                batch.wipe()
            self.ready.clear()
            self._spare.clear()
            self._stock = 0
