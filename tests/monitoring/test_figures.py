"""Reading a segment's statistics while their writers are at it. Invariant L5, the reader's part."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from shmbroker.errors import SegmentError
from shmbroker.lane.ends import fence
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment
from shmbroker.memory.statistics_block import StatisticsBlock
from shmbroker.monitoring import figures
from shmbroker.monitoring.figures import ATTEMPTS, read_figures
from tests.conftest import SegmentOf

GEOMETRY = Geometry(arena_bytes=16 * layout.PAGE, channel_count=2, depth=4)
CLIENTS_VALUES = layout.offset_of(layout.ChannelStatistics, "worker_revision") // 8 - 1
WORKERS_VALUES = 4


@pytest.fixture
def segment(segment_of: SegmentOf) -> Segment:
    segment = segment_of(GEOMETRY)
    write(segment, 1)
    return segment


def write(segment: Segment, number: int) -> None:
    """Blocks that are full of ``number``, of both ends of channel 0."""
    offset = GEOMETRY.statistics_of(0)
    StatisticsBlock(segment, offset, fence).write([number] * CLIENTS_VALUES)
    worker = offset + layout.offset_of(layout.ChannelStatistics, "worker_revision")
    StatisticsBlock(segment, worker, fence).write([number] * (1 + WORKERS_VALUES))


def seen(segment: Segment) -> set[int]:
    """The numbers that are found in channel 0: one, if it was read whole."""
    (channel,) = read_figures(segment.name).channels
    return {channel.calls, channel.errors, channel.call_ns, channel.buckets[-1], channel.run_calls, channel.queued_ns}


def before_each_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Have ``act(n)`` happen right before the statistics are read for the n-th time, counted from 0; pauses take no time."""
    pread = os.pread
    reads = 0

    def watched(fd: int, nbytes: int, offset: int) -> bytes:
        nonlocal reads
        if nbytes > layout.PAGE:
            act(reads)
            reads += 1
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", watched)
    monkeypatch.setattr(figures.time, "sleep", lambda seconds: None)


def revision_word(segment: Segment, field: str) -> int:
    return (segment.geometry.statistics_of(0) + layout.offset_of(layout.ChannelStatistics, field)) // 8


def test_what_nobody_writes_is_read_at_once(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """L5: twice, to know that nothing has changed meanwhile."""
    reads: list[int] = []
    before_each_read(monkeypatch, reads.append)
    assert seen(segment) == {1}
    assert reads == [0, 1]


@pytest.mark.parametrize("field", ["revision", "worker_revision"])
def test_a_block_that_is_being_written_is_read_again_when_it_is_whole(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """L5: an odd revision is waited out."""
    word = revision_word(segment, field)
    segment.words[word] += 1
    segment.words[word + 5 : word + 6] = memoryview(bytes(8)).cast("Q")  # half of it is of another number

    def act(read: int) -> None:
        if read == 2:
            segment.words[word] += 1
            write(segment, 2)

    before_each_read(monkeypatch, act)
    assert seen(segment) == {2}


def test_a_block_that_changes_between_two_reads_is_read_again(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """L5: the first read may have been of both."""
    before_each_read(monkeypatch, lambda read: write(segment, 2) if read == 1 else None)
    assert seen(segment) == {2}


def test_a_writer_that_never_ends_is_not_waited_for(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """L5: it may have died in the midst of it; what was read last has to do."""
    reads: list[int] = []
    segment.words[revision_word(segment, "revision")] += 1
    before_each_read(monkeypatch, reads.append)
    assert seen(segment) == {1}
    assert len(reads) == ATTEMPTS


def test_a_segment_that_is_gone_or_never_was_is_told(segment: Segment) -> None:
    with pytest.raises(SegmentError, match="cannot be opened"):
        read_figures(f"{segment.name}x")


def test_a_header_tells_who_made_it_for_whom_and_when(segment: Segment) -> None:
    figures = read_figures(segment.name)
    assert (figures.owner, figures.owner_pid, figures.maker_pid) == ("test", os.getpid(), os.getpid())
    assert 0 <= figures.age_seconds < 3600
    made_at = layout.offset_of(layout.SegmentHeader, "made_at_ns") // 8
    segment.words[made_at] = (1 << 64) - 1  # whoever has the segment may write there
    assert read_figures(segment.name).age_seconds == 0
    segment.words[made_at] = 0
    assert read_figures(segment.name).age_seconds > 3600
