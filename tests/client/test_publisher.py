"""What a client tells of itself in its segment's header: it costs calls nothing, and calls heed none of it."""

from __future__ import annotations

import torch

import shmbroker
from shmbroker.client.channel import Channel
from shmbroker.memory import layout
from shmbroker.monitoring.figures import read_figures
from tests.processes import wait_until


def test_calls_go_on_whatever_stands_in_the_statistics(channel: Channel, client: shmbroker.Client) -> None:
    """L5: peers of a call read none of it."""
    double = channel.bind("double")
    segment = channel.memory.segment
    geometry = segment.geometry
    arena = slice(layout.offset_of(layout.SegmentHeader, "arena"), layout.offset_of(layout.SegmentHeader, "reserved2"))
    channels = slice(geometry.statistics_offset, geometry.channels_offset)
    for filler in (b"\xff", b"\x00", b"\x01"):
        for number in range(5):
            for part in (arena, channels):
                segment.map[part] = filler * (part.stop - part.start)
            assert double(client.empty((64,)).fill_(number)).tolist() == [2.0 * number] * 64


def test_what_is_told_is_what_was_counted(channel: Channel, client: shmbroker.Client) -> None:
    double = channel.bind("double")
    held = client.empty((1 << 16,), torch.uint8)
    for _ in range(7):
        double(torch.ones(16))

    def told() -> list[tuple[int, int, int]]:
        channels = read_figures(channel.memory.segment.name).channels
        return [(one.calls, one.sent_bytes, one.copied_bytes) for one in channels if one.index == channel.index]

    wait_until(lambda: told() == [(7, 7 * 64, 7 * 64)])
    wait_until(lambda: read_figures(channel.memory.segment.name).arena.held_bytes >= held.nbytes)
