"""torch's number of compute threads, lowered for products so small that waking a thread costs more than it does.

The number is the process's: whoever lowers it holds a lock, and whoever wants to know it waits for that.
"""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()


def compute_threads() -> int:
    """By how many threads torch computes, as it was before anything here lowered it."""
    with _lock:
        return torch.get_num_threads()


class SingleThreaded:
    """A block in which torch computes by the calling thread alone. Not to be entered twice by one thread."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        _lock.acquire()
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._before)
        _lock.release()
