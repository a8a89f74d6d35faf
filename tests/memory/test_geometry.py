"""A geometry's arithmetic: what it may be, and where things lie in a segment of it."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.layout import (
    ChannelHeader,
    ChannelStatistics,
    SegmentHeader,
)
from tests.memory.golden import (
    LINE_PAIR,
)

geometries = st.builds(
    Geometry,
    arena_bytes=st.integers(1, 1 << 20).map(lambda pages: pages * layout.PAGE),
    channel_count=st.integers(1, 1024),
    depth=st.integers(0, 16).map(lambda power: 1 << power),
)


@pytest.mark.parametrize("arena_bytes", [0, 1, -layout.PAGE, layout.PAGE - 1, layout.PAGE + 1, layout.PAGE + layout.ALIGNMENT])
def test_arena_must_measure_whole_pages(arena_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"arena_bytes .* not {arena_bytes}$"):
        Geometry(arena_bytes=arena_bytes)


@pytest.mark.parametrize("channel_count", [-1, 0, 1025])
def test_channel_count_must_be_1_to_1024(channel_count: int) -> None:
    with pytest.raises(ValueError, match=f"channel_count .* not {channel_count}$"):
        Geometry(channel_count=channel_count)


@pytest.mark.parametrize("depth", [-2, -1, 0, 3, 6, 65535, 131072])
def test_depth_must_be_a_power_of_two_up_to_65536(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth .* not {depth}$"):
        Geometry(depth=depth)


@pytest.mark.parametrize("geometry", [Geometry(layout.PAGE, 1, 1), Geometry(1 << 40, 1024, 65536), Geometry()], ids=str)
def test_extremes_and_defaults_are_allowed(geometry: Geometry) -> None:
    assert geometry.total_bytes > geometry.arena_bytes


def test_places_of_one_geometry_are_as_published() -> None:
    geometry = Geometry(arena_bytes=1 << 20, channel_count=3, depth=4)
    assert (geometry.submissions_offset, geometry.completions_offset, geometry.channel_bytes) == (512, 8704, 12800)
    assert (geometry.statistics_offset, geometry.statistics_of(2), geometry.channels_offset) == (4096, 6144, 8192)
    assert [geometry.channel_offset(index) for index in range(3)] == [8192, 20992, 33792]
    assert geometry.arena_offset == 49152
    assert geometry.total_bytes == 49152 + (1 << 20)


@settings(deadline=None, max_examples=200)
@given(geometries)
def test_areas_of_any_geometry_are_aligned_and_follow_each_other_without_overlap(geometry: Geometry) -> None:
    last = geometry.channel_count - 1
    assert geometry.statistics_offset == ctypes.sizeof(SegmentHeader)
    assert geometry.channel_offset(0) == geometry.channels_offset >= geometry.statistics_of(last) + ctypes.sizeof(ChannelStatistics)
    assert geometry.channel_offset(1) - geometry.channel_offset(0) == geometry.channel_bytes
    assert geometry.submissions_offset >= ctypes.sizeof(ChannelHeader)
    assert geometry.completions_offset >= geometry.submissions_offset + geometry.depth * layout.SUBMISSION_SLOT_BYTES
    assert geometry.channel_bytes >= geometry.completions_offset + geometry.depth * layout.COMPLETION_SLOT_BYTES
    assert geometry.channel_offset(last) % LINE_PAIR == 0
    assert 0 <= geometry.arena_offset - (geometry.channel_offset(last) + geometry.channel_bytes) < layout.PAGE
    assert geometry.arena_offset % layout.PAGE == geometry.arena_offset % layout.ALIGNMENT == 0
    assert geometry.total_bytes == geometry.arena_offset + geometry.arena_bytes
    assert geometry.total_bytes % layout.PAGE == 0


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 20))
def test_rounding_up_gives_the_least_multiple_that_is_not_below(value: int, multiple: int) -> None:
    rounded = layout.round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple
