"""What a client tells of itself in its segment's header: counters of its channels, and a picture of its arena.

Nothing here is on the path of a call. The calls count in the client's own memory; ten times a second the thread that keeps the client known to the
broker copies what has changed into the segment. Whoever looks only reads, and is never waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shmbroker.arena.arena import Arena
from shmbroker.call.statistics import TrustCounts
from shmbroker.lane.ends import fence
from shmbroker.memory import layout
from shmbroker.memory.segment import Segment
from shmbroker.memory.statistics_block import StatisticsBlock, text_words

if TYPE_CHECKING:
    from shmbroker.client.channel import Channel

PICTURE_SHARE = 0.01
"""Of the time, at most, that drawing the arena takes: one of a hundred thousand blocks is drawn more rarely."""

_ARENA = layout.offset_of(layout.SegmentHeader, "arena")
_WORD = (1 << 64) - 1


class Publisher:
    """Writes the statistics of one client. ``channels``: those that are open."""

    def __init__(self, segment: Segment, arena: Arena, channels: Callable[[], Sequence[Channel]]) -> None:
        self._segment = segment
        self._arena = arena
        self._channels = channels
        self._lock = threading.Lock()
        """An area that was cleared must not be written to by a publication that had begun before."""
        self._arena_block: StatisticsBlock | None = StatisticsBlock(segment, _ARENA, fence)
        self._told: dict[Channel, tuple[tuple[int, ...], TrustCounts]] = {}
        self._arena_told: tuple[int, ...] = ()
        self._next_picture = 0.0

    def publish(self) -> None:
        """Write what has changed since the last time."""
        with self._lock:
            channels = self._channels()
            self._told = {channel: self._told[channel] for channel in channels if channel in self._told}
            for channel in channels:
                self._publish_channel(channel)
        self._publish_arena()  # without the lock: the arena has one of its own

    def _publish_channel(self, channel: Channel) -> None:
        counted, trust = channel.counted(), channel.trust()
        if self._told.get(channel) == (counted, trust):
            return
        self._told[channel] = counted, trust
        offset = self._segment.geometry.statistics_of(channel.index)
        # Clipped, as no word may spoil the others.
        values = [time.monotonic_ns(), channel.opened_ns, *[min(max(value, 0), _WORD) for value in counted[: -layout.BUCKETS]]]
        values += text_words(channel.lane, 8) + text_words(channel.doorbell, 8) + text_words(channel.worker_id, 32)
        values += text_words(channel.service, 64) + list(counted[-layout.BUCKETS :])
        values += text_words(trust.mode, 16) + [min(max(count, 0), _WORD) for count in trust[1:]]
        StatisticsBlock(self._segment, offset, fence).write(values)

    def _publish_arena(self) -> None:
        begun = time.monotonic()
        block = self._arena_block
        if block is None or begun < self._next_picture:
            return
        picture = self._arena.picture(layout.PICTURED_BLOCKS)
        told = picture.words()
        if told != self._arena_told:
            self._arena_told = told
            block.write((time.monotonic_ns(), *told))
        ended = time.monotonic()
        self._next_picture = ended + (ended - begun) / PICTURE_SHARE

    def close(self) -> None:
        """Let go of the segment. All channels are closed before."""
        self._arena_block = None

    def clear(self, index: int) -> None:
        """The channel there is closed: nothing is told of it any more."""
        with self._lock:
            offset = self._segment.geometry.statistics_of(index)
            self._segment.map[offset : offset + layout.STATISTICS_BYTES] = bytes(layout.STATISTICS_BYTES)
