"""Landing: completions of calls whose device still works are published when it is done, in order, by a thread that waits for it.

The thread that serves frames meanwhile launches the next call. With such a device it is the landing thread alone that writes completions of the
shm lane: a queue has one producer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from shmbroker.lane.completion_frames import Completion, CompletionFields
from shmbroker.worker.device_memory import Launched


class InFlight(NamedTuple):
    """A call that was launched: what it waits for, and how to say how it ended."""

    launched: Launched
    finish: Callable[[BaseException | None], CompletionFields]
    """Given what went wrong, or None."""


def landed(outcome: CompletionFields | InFlight) -> CompletionFields:
    """The completion, once it may be published."""
    if not isinstance(outcome, InFlight):
        return outcome
    try:
        outcome.launched.wait()
    except BaseException as error:  # the device's error is the answer to the call
        return outcome.finish(error)
    return outcome.finish(None)


class Landing:
    """The thread. ``put`` and ``drain`` are called by the thread that serves frames."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[CompletionFields | InFlight, Callable[[CompletionFields], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._land, name="shmbroker-landing", daemon=True)
        self._thread.start()

    def put(self, outcome: CompletionFields | InFlight, complete: Callable[[CompletionFields], None]) -> None:
        """Have ``complete`` called with the completion, after those before it."""
        self._queue.put((outcome, complete))

    def drain(self) -> None:
        """Wait until all that was put has landed: before memory is unmapped that copies may still be writing to."""
        self._queue.join()

    def stop(self) -> None:
        """Land all, and end."""
        self._queue.put(None)
        self._thread.join()

    def _land(self) -> None:
        while (one := self._queue.get()) is not None:
            try:
                one[1](landed(one[0]))
            finally:
                self._queue.task_done()
                one = None  # nothing of a client that is gone


__all__ = ["Completion", "InFlight", "Landing", "landed"]
