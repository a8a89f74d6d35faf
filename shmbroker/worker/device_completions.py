"""Completions of calls that a device still works on: published when it is done, in order, by a thread that waits for it.

The thread that runs frames meanwhile launches the next call. With such a device it is the thread here alone that writes completions of the shm lane:
a queue has one producer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.worker.device_memory import Launched


class InFlight(NamedTuple):
    """A call that was launched: what it waits for, and how to say how it ended."""

    launched: Launched
    finish: Callable[[BaseException | None], CompletionFields]
    """Given what went wrong, or None."""


def completed(outcome: CompletionFields | InFlight) -> CompletionFields:
    """The completion, once it may be published: waits for the device where the call is in flight."""
    if not isinstance(outcome, InFlight):
        return outcome
    try:
        outcome.launched.wait()
    except BaseException as error:  # the device's error is the answer to the call
        return outcome.finish(error)
    return outcome.finish(None)


class DeviceCompletions:
    """The queue of calls in flight, and the thread that completes them, from its making to :meth:`stop`.

    ``put``, ``drain`` and ``stop`` are called by the thread that runs frames; the queue is all that the two share.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[CompletionFields | InFlight, Callable[[CompletionFields], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._complete_all, name="shmbroker-device-completions", daemon=True)
        self._thread.start()

    def put(self, outcome: CompletionFields | InFlight, complete: Callable[[CompletionFields], None]) -> None:
        """Have ``complete`` called with the completion, after those before it, by the thread here."""
        self._queue.put((outcome, complete))

    def drain(self) -> None:
        """Wait until all that was put is completed: before memory is unmapped that copies may still be writing to."""
        self._queue.join()

    def stop(self) -> None:
        """Complete all, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _complete_all(self) -> None:
        while (one := self._queue.get()) is not None:
            try:
                one[1](completed(one[0]))
            finally:
                self._queue.task_done()
                one = None  # nothing of a client that is gone
