"""The sizes that a segment is made with: how many channels, how deep their queues, how many bytes of arena."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from shmbroker.memory import layout
from shmbroker.settings.schema import DEFAULTS
from shmbroker.settings.sizes import parse_bytes

DEFAULT_ARENA_BYTES = parse_bytes(DEFAULTS.arena)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a segment, bytes unless named otherwise.

    ``depth`` holds for both queues of a channel; a power of two, so a position becomes a slot by a mask.
    """

    arena_bytes: int = DEFAULT_ARENA_BYTES
    channel_count: int = DEFAULTS.channels
    depth: int = DEFAULTS.depth

    def __post_init__(self) -> None:
        if self.arena_bytes < layout.PAGE or self.arena_bytes % layout.PAGE:
            raise ValueError(f"arena_bytes must be a positive multiple of {layout.PAGE}, not {self.arena_bytes}")
        if not 1 <= self.channel_count <= 1024:
            raise ValueError(f"channel_count must be 1 to 1024, not {self.channel_count}")
        if not 1 <= self.depth <= 65536 or self.depth & (self.depth - 1):
            raise ValueError(f"depth must be a power of two up to 65536, not {self.depth}")

    @property
    def submissions_offset(self) -> int:
        """Of the submission queue, from the start of a channel area."""
        return ctypes.sizeof(layout.ChannelHeader)

    @property
    def completions_offset(self) -> int:
        """Of the completion queue, from the start of a channel area."""
        return self.submissions_offset + self.depth * ctypes.sizeof(layout.SubmissionFrame)

    @property
    def channel_bytes(self) -> int:
        """Of one channel area."""
        return self.completions_offset + self.depth * ctypes.sizeof(layout.CompletionFrame)

    @property
    def statistics_offset(self) -> int:
        """Of the first channel's statistics, from the start of the segment."""
        return ctypes.sizeof(layout.SegmentHeader)

    def statistics_of(self, index: int) -> int:
        """Offset of the statistics of channel ``index``, from the start of the segment."""
        return self.statistics_offset + index * layout.STATISTICS_BYTES

    @property
    def channels_offset(self) -> int:
        """Of the first channel area, from the start of the segment; a whole number of pages."""
        return layout.round_up(self.statistics_of(self.channel_count), layout.PAGE)

    def channel_offset(self, index: int) -> int:
        """Of channel area ``index``, from the start of the segment."""
        return self.channels_offset + index * self.channel_bytes

    @property
    def arena_offset(self) -> int:
        """Of the arena, from the start of the segment; a whole number of pages."""
        return layout.round_up(self.channel_offset(self.channel_count), layout.PAGE)

    @property
    def total_bytes(self) -> int:
        """Of the segment."""
        return self.arena_offset + self.arena_bytes
