"""A queue of frames in shared memory: one producer, one consumer, fixed slots, and a sequence number per slot that is written last.

The producer of a queue writes its slots, the consumer writes one word, ``taken``::

    position p goes into slot p % depth
    free        taken > p - depth       the producer may fill the slot
    published   sequence == p + 1       the consumer may copy the frame

Q1  A slot is filled only after the consumer has taken what was in it ``depth`` positions before.
Q2  The sequence number is stored last, as one aligned 64-bit word, so a frame is seen whole or not at all.
Q3  The consumer copies the frame before it says that it has taken it.

Plain stores and loads keep these orders on x86-64 only (total store order); elsewhere lane shm needs the compiled ends, whose core says in which order
each step is seen (``shmbroker/include/shmbroker/word.h``).
A peer that writes nonsense into its words can lose its own frames, nothing else: positions are counted privately.
"""

from __future__ import annotations

import operator

from shmbroker.lane.frame_layout import SEQUENCE_WORD
from shmbroker.lane.frames import Slot
from shmbroker.memory.segment import Segment


def word_at(segment: Segment, offset: int) -> int:
    """Index in ``segment.words`` of the word at ``offset`` (bytes). Raises ValueError where none lies."""
    nbytes = len(segment.map)
    if operator.index(offset) % 8 or not 0 <= offset <= nbytes - 8:
        raise ValueError(f"a word at {offset} does not lie in a segment of {nbytes} bytes")
    return offset // 8


def _slots(segment: Segment, offset: int, depth: int, slot_bytes: int) -> list[Slot]:
    memory = memoryview(segment.map)
    if depth < 1 or depth & (depth - 1) or operator.index(offset) % 8 or offset < 0 or offset + depth * slot_bytes > len(memory):
        raise ValueError(f"{depth} slots of {slot_bytes} bytes at {offset} do not lie in a segment of {len(memory)} bytes")
    starts = range(offset, offset + depth * slot_bytes, slot_bytes)
    return [Slot(memory[at : at + slot_bytes]) for at in starts]


class _QueueEnd:
    """What both ends have: where the slots lie, and how many frames have gone by, counted here."""

    __slots__ = ("_mask", "_position", "_slots", "_taken_word", "_words")

    def __init__(self, segment: Segment, offset: int, depth: int, slot_bytes: int, taken_offset: int) -> None:
        self._slots = _slots(segment, offset, depth, slot_bytes)
        self._words = segment.words
        self._taken_word = word_at(segment, taken_offset)
        self._mask = depth - 1
        self._position = 0


class QueueWriter(_QueueEnd):
    """The producer's end. Not thread-safe."""

    __slots__ = ("_known_taken",)

    def __init__(self, segment: Segment, offset: int, depth: int, slot_bytes: int, taken_offset: int) -> None:
        super().__init__(segment, offset, depth, slot_bytes, taken_offset)
        self._known_taken = 0

    def claim(self) -> Slot | None:
        """The next slot, to be filled; None while the queue is full (Q1).

        A slot that was given is followed by one :meth:`commit`, or by none: then nothing is published, and the next claim gives the same slot.
        """
        position = self._position
        if position - self._known_taken > self._mask:
            self._known_taken = min(self._words[self._taken_word], position)
            if position - self._known_taken > self._mask:
                return None
        return self._slots[position & self._mask]

    def commit(self) -> None:
        """Publish the slot that was claimed last (Q2). Once for each :meth:`claim` that gave one, after all of the frame is written."""
        position = self._position
        self._slots[position & self._mask].words[SEQUENCE_WORD] = position + 1
        self._position = position + 1


class QueueReader(_QueueEnd):
    """The consumer's end. Not thread-safe."""

    __slots__ = ()

    def ready(self) -> bool:
        """Whether a frame is published and not yet taken."""
        position = self._position
        return bool(self._slots[position & self._mask].words[SEQUENCE_WORD] == position + 1)

    def take(self) -> bytes | None:
        """A copy of the next frame, or None when there is none (Q3)."""
        slot = self.peek()
        if slot is None:
            return None
        frame = bytes(slot.bytes)
        self.advance()
        return frame

    def peek(self) -> Slot | None:
        """The slot of the next frame, to be copied from; None when there is none.

        A slot that was given is followed by one :meth:`advance`; until then it stays the producer's to leave alone, and peeking gives it again.
        """
        position = self._position
        slot = self._slots[position & self._mask]
        return slot if slot.words[SEQUENCE_WORD] == position + 1 else None

    def advance(self) -> None:
        """Say that the frame has been copied: its slot may be filled again (Q3). Once for each :meth:`peek` that gave one."""
        self._position = position = self._position + 1
        self._words[self._taken_word] = position
