"""Writing a block of statistics into a segment so that whoever looks, from any process, sees all of it or knows better (L5)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from shmbroker.memory.segment import Segment


class StatisticsBlock:
    """The words of one block, of which the first is its revision. One writer; costs one copy of the words."""

    __slots__ = ("_fence", "_first", "_words")

    def __init__(self, segment: Segment, offset: int, fence: Callable[[], None]) -> None:
        """``offset``: of the revision in the segment, bytes. ``fence``: keeps the stores before it from being seen after those behind it."""
        self._fence = fence
        self._words = segment.words
        self._first = offset // 8

    def write(self, values: Sequence[int]) -> None:
        """Publish ``values``, the words after the revision (0 to 2**64 - 1)."""
        words, first = self._words, self._first
        copied = array("Q", values)
        revision = words[first] | 1  # also of a writer that was replaced in the midst of it
        words[first] = revision
        self._fence()
        words[first + 1 : first + 1 + len(copied)] = memoryview(copied)
        self._fence()
        words[first] = (revision + 1) % (1 << 64)


def text_words(text: str, nbytes: int) -> list[int]:
    """``text`` as the words of a field of ``nbytes`` bytes: UTF-8, cut at a character, zero-padded."""
    encoded = text.encode("utf-8", "replace")[: nbytes - 1].decode("utf-8", "ignore").encode()
    return list(array("Q", encoded.ljust(nbytes, b"\0")))
