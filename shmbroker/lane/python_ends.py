"""The four ends of a channel's two queues, in Python: what each side may do with its end, and no more.

========================  ======  ====================================================================
``SubmissionSender``      client  ``submit`` a frame: fill a slot, publish it, ring if the worker sleeps
``SubmissionReceiver``    worker  ``take`` the next call
``CompletionSender``      worker  ``complete`` a call
``CompletionReceiver``    client  ``take`` the next completion
========================  ======  ====================================================================

``_ends.c`` has the same ends compiled; :mod:`shmbroker.lane.ends` says which are used. Nothing here is thread-safe.

What both refuse, with the same errors, and what leaves the queue as it was: a number that does not fit its field, offsets or generations that are not
one for each tensor, a completion that has not five parts or too long a body (ValueError), what is no integer where one belongs (TypeError), and words
or slots that do not lie in the segment (ValueError, from the constructors). A full queue is noticed before anything else. The compiled ends alone
insist on the kinds: offsets and generations as lists or tuples, a completion as a tuple, its body as bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from shmbroker.lane.completion_frames import CompletionFields, read_completion, read_plain_completion, write_completion
from shmbroker.lane.doorbell import fence
from shmbroker.lane.frames import FrameTemplate, Slot, Taken, taken_of
from shmbroker.lane.queue import QueueReader, QueueWriter, word_at
from shmbroker.memory import layout
from shmbroker.memory.segment import Segment


class Receiver(Protocol):
    """An end that frames come out of."""

    def ready(self) -> bool:
        """Whether a frame is published and not yet taken."""


class _Sender:
    """Fills slots, and wakes the peer when its word says that it sleeps (D1)."""

    __slots__ = ("_queue", "_ring", "_sleeping", "_words")

    def __init__(self, queue: QueueWriter, segment: Segment, sleeping_offset: int, ring: Callable[[], None]) -> None:
        self._queue = queue
        self._words = segment.words
        self._sleeping = word_at(segment, sleeping_offset)
        self._ring = ring

    def _commit(self) -> None:
        self._queue.commit()
        # fault: after publishing
        fence()
        if self._words[self._sleeping]:
            self._wake()

    def _wake(self) -> None:
        # fault: before doorbell rung
        self._words[self._sleeping] = 0  # D4
        # fault: amid doorbell rung
        self._ring()
        # fault: after doorbell rung


class SubmissionSender(_Sender):
    """The client's end of the submission queue."""

    __slots__ = ()

    def __init__(self, segment: Segment, offset: int, taken_offset: int, sleeping_offset: int, ring: Callable[[], None]) -> None:
        queue = QueueWriter(segment, offset, segment.geometry.depth, layout.SUBMISSION_SLOT_BYTES, taken_offset)
        super().__init__(queue, segment, sleeping_offset, ring)

    def nudge(self) -> None:
        """Wake the worker if it sleeps: a frame will follow in a moment (D4)."""
        if self._words[self._sleeping]:
            self._wake()

    def submit(
        self, template: FrameTemplate, call_id: int, deadline_ns: int, submitted_ns: int, offsets: list[int], generations: list[int]
    ) -> bool:
        """Write a frame and publish it; False while the queue is full."""
        slot = self._queue.claim()
        if slot is None:
            return False
        # fault: before frame written
        template.write(slot, call_id, deadline_ns, submitted_ns, offsets, generations)
        # fault: amid frame written
        self._commit()
        # fault: after frame written
        return True


class SubmissionReceiver:
    """The worker's end of the submission queue."""

    __slots__ = ("_queue", "ready")

    def __init__(self, segment: Segment, offset: int, taken_offset: int) -> None:
        self._queue = QueueReader(segment, offset, segment.geometry.depth, layout.SUBMISSION_SLOT_BYTES, taken_offset)
        self.ready = self._queue.ready

    def take(self) -> Taken | None:
        """The next call, from a private copy of its frame (F1), or None."""
        # fault: before frame taken
        frame = self._queue.take()
        # fault: after frame taken
        return None if frame is None else taken_of(frame)


class CompletionSender(_Sender):
    """The worker's end of the completion queue."""

    __slots__ = ()

    def __init__(self, segment: Segment, offset: int, taken_offset: int, sleeping_offset: int, ring: Callable[[], None]) -> None:
        queue = QueueWriter(segment, offset, segment.geometry.depth, layout.COMPLETION_SLOT_BYTES, taken_offset)
        super().__init__(queue, segment, sleeping_offset, ring)

    def complete(self, completion: CompletionFields) -> bool:
        """Write a completion and publish it; False while the queue is full."""
        slot: Slot | None = self._queue.claim()
        if slot is None:
            return False
        # fault: before completion written
        write_completion(slot, completion)
        # fault: amid completion written
        self._commit()
        # fault: after completion written
        return True


class CompletionReceiver:
    """The client's end of the completion queue."""

    __slots__ = ("_depth", "_queue", "ready")

    def __init__(self, segment: Segment, offset: int, taken_offset: int) -> None:
        self._depth = segment.geometry.depth
        self._queue = QueueReader(segment, offset, self._depth, layout.COMPLETION_SLOT_BYTES, taken_offset)
        self.ready = self._queue.ready

    def take(self) -> CompletionFields | None:
        """The next completion, or None. Those that cannot be one are passed over, a queue full of them at most: a peer could go on for ever."""
        queue = self._queue
        for _ in range(self._depth):
            slot = queue.peek()
            if slot is None:
                return None
            completion = read_plain_completion(slot)
            if completion is None:
                completion = read_completion(bytes(slot.bytes))
            # fault: before completion taken
            queue.advance()
            # fault: after completion taken
            if completion is not None:
                return completion
        return None


def before_sleep(sleeping: Sequence[tuple[memoryview, int]]) -> None:
    """Put up the words, each a memory of 64-bit words and an index: who looks for a frame after this, and sees none, will be rung for (D1)."""
    for words, index in sleeping:
        words[index] = 1
    fence()


def after_sleep(sleeping: Sequence[tuple[memoryview, int]]) -> None:
    """Put them down."""
    for words, index in sleeping:
        words[index] = 0


IMPOLITE_SECONDS = 50e-6
"""A spin that takes longer makes way for whoever wants the core, each time it looks at the clock."""

LONGEST_SPIN_SECONDS = 1.0
"""No signal is handled meanwhile where the spin is compiled."""


def spin(receivers: tuple[Receiver, ...], seconds: float) -> bool:
    """Look for a frame at any of ``receivers``, once at least, and for so long (a second at most); whether there is one."""
    looks = [receiver.ready for receiver in receivers]
    clock = time.perf_counter
    now = clock()
    until, impolite_until = now + min(seconds, LONGEST_SPIN_SECONDS), now + IMPOLITE_SECONDS
    if len(looks) == 1:
        looks *= 4  # for each look at the clock: what comes is seen that much sooner
    while True:
        if now > impolite_until:
            os.sched_yield()
        for ready in looks:
            if ready():
                return True
        now = clock()
        if not now < until:
            return False
