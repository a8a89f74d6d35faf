"""What the tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import make_segment, unlink_segment
from tests.peers import broker, channel, client, worker

__all__ = ["broker", "channel", "client", "worker"]

SMALL = Geometry(arena_bytes=16 * layout.PAGE, channel_count=2, depth=4)
"""Of a segment that is made in no time."""


@pytest.fixture
def name(instance: str) -> Iterator[str]:
    """A name for one segment, taken away afterwards whatever came of it."""
    name = names.segment_name(instance, names.new_id())
    yield name
    unlink_segment(name)


@pytest.fixture
def made(name: str, instance: str) -> Iterator[str]:
    """The name of a small segment that this process holds as its maker."""
    hold = make_segment(name, SMALL, instance=instance, owner="owner", owner_pid=4711)
    yield name
    hold.release()
