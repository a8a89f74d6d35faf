"""The channel areas of a client's segment: which are free, and which a closed channel still keeps."""

from __future__ import annotations

import threading


class Areas:
    """Areas by their index in the segment. Thread-safe."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._parked: dict[str, list[int]] = {}
        """By worker: those of closed channels of which it still ran a call."""
        self._lock = threading.Lock()

    @property
    def parked(self) -> int:
        """How many a closed channel still keeps."""
        with self._lock:
            return sum(map(len, self._parked.values()))

    def take(self) -> int | None:
        """A free one, or None."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give_back(self, index: int) -> None:
        """It is free again."""
        with self._lock:
            self._free.append(index)

    def park(self, index: int, worker: str) -> None:
        """It is free again when ``worker`` is gone, which may still write to its queues."""
        with self._lock:
            self._parked.setdefault(worker, []).append(index)

    def unpark(self, worker: str) -> None:
        """``worker`` is gone."""
        with self._lock:
            self._free += self._parked.pop(worker, ())
