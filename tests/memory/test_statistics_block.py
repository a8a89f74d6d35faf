"""Blocks of statistics: who looks sees a whole one or knows better. Invariant L5, the writer's part; the reader's is in ``tests/monitoring``."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.lane.ends import fence
from shmbroker.memory import layout
from shmbroker.memory.segment import Segment
from shmbroker.memory.statistics_block import StatisticsBlock, text_words
from tests.conftest import END_SECONDS, SegmentOf, StartChild
from tests.memory.conftest import SMALL

UINT64_MAX = (1 << 64) - 1
VALUES = 40
"""Of a block in these tests: more than are copied at once."""

WHOLE_BLOCKS = 300
LOOKING_SECONDS = 60.0
"""In which so many whole blocks must have been seen: many times what it takes."""


@pytest.fixture
def segment(segment_of: SegmentOf) -> Segment:
    return segment_of(SMALL)


class WatchedWords:
    """Stands for a segment's words: notes the revision, at index 0, whenever anything is written."""

    def __init__(self, revision: int) -> None:
        self.words = memoryview(bytearray(8 * (1 + VALUES))).cast("Q")
        self.words[0] = revision
        self.order: list[tuple[str, int]] = []

    def __getitem__(self, index: int) -> int:
        return self.words[index]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        self.words[index] = value
        self.order.append(("revision" if index == 0 else "values", self.words[0]))


class Watched:
    """A segment of nothing but one block."""

    def __init__(self, revision: int) -> None:
        self.words = WatchedWords(revision)


@pytest.mark.parametrize(
    ("before", "while_writing", "after"),
    [(0, 1, 2), (2, 3, 4), (1, 1, 2), (4711, 4711, 4712), (UINT64_MAX - 1, UINT64_MAX, 0), (UINT64_MAX, UINT64_MAX, 0)],
)
def test_the_revision_is_odd_while_a_block_is_written_and_then_even_and_another(before: int, while_writing: int, after: int) -> None:
    """L5: also where a writer that died in the midst of it has left it odd."""
    segment = Watched(before)
    order = segment.words.order
    StatisticsBlock(segment, 0, lambda: order.append(("fence", segment.words.words[0]))).write(range(VALUES))  # type: ignore[arg-type]
    written = [
        ("revision", while_writing),
        ("fence", while_writing),
        ("values", while_writing),
        ("fence", while_writing),
        ("revision", after),
    ]
    assert order == written
    assert segment.words.words.tolist() == [after, *range(VALUES)]


def test_a_block_is_written_where_it_lies_and_nowhere_else(segment: Segment) -> None:
    offset = segment.geometry.statistics_of(1)
    before = bytes(segment.map)
    block = StatisticsBlock(segment, offset, fence)
    for number in range(1, 4):
        block.write([number] * VALUES)
        words = segment.words[offset // 8 : offset // 8 + 1 + VALUES].tolist()
        assert words == [2 * number, *[number] * VALUES]
    after = bytes(segment.map)
    assert after[:offset] == before[:offset]
    assert after[offset + 8 * (1 + VALUES) :] == before[offset + 8 * (1 + VALUES) :]


def test_what_no_word_can_hold_is_refused_before_anything_is_written(segment: Segment) -> None:
    offset = segment.geometry.statistics_of(0)
    for value in (-1, UINT64_MAX + 1):
        with pytest.raises(OverflowError):
            StatisticsBlock(segment, offset, fence).write([1, value])
        assert not any(segment.words[offset // 8 : offset // 8 + 3])


def _write_without_end(name: str, offset: int) -> None:
    block = StatisticsBlock(Segment.attach(name, hold=False), offset, fence)
    for number in itertools.count():
        block.write([number] * VALUES)
        time.sleep(0)


def test_who_reads_the_same_even_revision_before_and_after_has_read_a_whole_block_of_another_process(
    segment: Segment, start_child: StartChild
) -> None:
    """L5, with a real race."""
    offset = segment.geometry.statistics_of(0)
    first = offset // 8
    child = start_child(_write_without_end, segment.name, offset)
    seen: set[int] = set()
    until = time.monotonic() + LOOKING_SECONDS
    while len(seen) < WHOLE_BLOCKS:
        assert time.monotonic() < until, f"{len(seen)} whole blocks seen"
        before = segment.words[first]
        values = segment.words[first + 1 : first + 1 + VALUES].tolist()
        if before % 2 == 0 and segment.words[first] == before != 0:
            assert set(values) == {before // 2 - 1}
            seen.add(before)
    child.kill()
    child.join(END_SECONDS)


@given(st.text(max_size=80), st.sampled_from([8, 32, 64]))
def test_a_text_is_cut_at_a_character_so_that_a_zero_ends_it(text: str, nbytes: int) -> None:
    words = text_words(text, nbytes)
    assert len(words) == nbytes // 8
    packed = b"".join(word.to_bytes(8, "little") for word in words)
    kept = packed.split(b"\0")[0].decode()
    known = text.split("\0")[0].encode("utf-8", "replace").decode()
    assert known.startswith(kept)
    assert len(kept.encode()) < nbytes
    if kept != known:
        assert len((kept + known[len(kept)]).encode()) >= nbytes


def test_both_halves_of_a_channels_statistics_and_the_arenas_begin_with_a_revision_of_their_own() -> None:
    """L5: each has a writer of its own."""
    assert layout.offset_of(layout.ArenaStatistics, "revision") == layout.offset_of(layout.ChannelStatistics, "revision") == 0
    worker_part = layout.offset_of(layout.ChannelStatistics, "worker_revision")
    names = [name for name, *_ in layout.ChannelStatistics._fields_]
    workers = names[names.index("worker_revision") + 1 :]
    assert {"run_calls", "failed_calls", "compute_ns", "queued_ns"} <= set(workers)
    assert all(layout.offset_of(layout.ChannelStatistics, name) > worker_part for name in workers)
