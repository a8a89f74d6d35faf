"""The baton of a pipeline: of the threads that carry parts of a pass, one computes here at a time; the others wait for the GPU worker, or for it.

Each computes with as many threads as the process may use. Two of them at once would take the cores from each other, and from the GPU worker.
"""

from __future__ import annotations

import threading


class Baton:
    """Held by the thread that computes. Threads that never took it are not held up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()

    def take(self) -> None:
        """Wait for it."""
        self._lock.acquire()
        self._here.held = True

    def pass_on(self) -> None:
        """Let another thread compute."""
        self._here.held = False
        self._lock.release()

    @property
    def held(self) -> bool:
        """Whether this thread has it."""
        return getattr(self._here, "held", False)
