"""Open channels: which there are, how long a segment stays mapped, and that no area is open twice. Changes are made by the test itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmbroker.control.liveness import process_of
from shmbroker.control.messages import OpenChannel
from shmbroker.errors import ChannelError, SegmentError
from shmbroker.memory import names
from shmbroker.memory.hold import Hold
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.worker.channel import WorkerChannel
from tests.worker.conftest import GEOMETRY, BareClient, Serving


@pytest.fixture
def log(serving: Serving) -> list[str]:
    """What is mapped, and what is not any more."""
    return serving.memory.log


def opened(serving: Serving, opening: OpenChannel) -> WorkerChannel:
    return serving.channels.open(opening, Lane.SHM, Doorbell.POLL)


def is_open(serving: Serving, channel: WorkerChannel) -> bool:
    try:
        return serving.channels.find(channel.number) is channel
    except ChannelError:
        return False


def test_a_segment_is_mapped_once_and_closed_when_its_last_channel_is_gone(serving: Serving, client: BareClient, log: list[str]) -> None:
    first, second = opened(serving, client.opening(0)), opened(serving, client.opening(1))
    assert first.mapped is second.mapped
    serving.channels.drop(first)
    serving.channels.drop(first)
    serving.frames.make_changes()
    assert log == ["mapped"]
    serving.channels.drop(second)
    assert log == ["mapped"], "not before the frame thread has time"
    serving.frames.make_changes()
    assert log == ["mapped", "unmapped"]


def test_who_opens_a_channel_while_the_last_one_is_being_closed_gets_a_mapping_of_its_own(
    serving: Serving, client: BareClient, log: list[str]
) -> None:
    first = opened(serving, client.opening())
    serving.channels.drop(first)
    second = opened(serving, client.opening())
    serving.frames.make_changes()
    assert log == ["mapped", "mapped", "unmapped"]
    assert second.mapped is not first.mapped
    assert second.mapped.segment.geometry == GEOMETRY
    assert hasattr(second.mapped.segment, "map")


def test_an_area_is_never_open_twice(serving: Serving, client: BareClient, log: list[str]) -> None:
    former, other = opened(serving, client.opening(0)), opened(serving, client.opening(1))
    latter = opened(serving, client.opening(0))
    assert [is_open(serving, channel) for channel in (former, other, latter)] == [False, True, True]
    serving.frames.make_changes()
    assert log == ["mapped"]
    assert latter.mapped is former.mapped
    with pytest.raises(ChannelError, match=r"channel area 0 of .* is open for process"):
        opened(serving, client.opening(0, process=process_of(1)))
    assert is_open(serving, latter)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"index": GEOMETRY.channel_count}, "channel area 4 of 4 does not exist"),
        ({"index": -1}, "channel area -1 of 4 does not exist"),
        ({"segment": "/shmbroker.x.segment.0123456789abcdef"}, "are not those of client"),
        ({"bell": "/shmbroker.x.bell.0123456789abcdef"}, "are not those of client"),
        ({"client": "../../etc/passwd"}, "are not those of client"),
    ],
)
def test_a_channel_that_is_refused_leaves_nothing_mapped(
    serving: Serving, client: BareClient, log: list[str], changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ChannelError, match=complaint):
        opened(serving, client.opening(**changes))
    assert log in ([], ["mapped", "unmapped"])
    assert serving.channels.totals() == (0, 0)


def test_a_channel_that_is_refused_closes_nothing_of_those_that_are_open(serving: Serving, client: BareClient, log: list[str]) -> None:
    channel = opened(serving, client.opening(0))
    with pytest.raises(ChannelError):
        opened(serving, client.opening(GEOMETRY.channel_count))
    assert log == ["mapped"]
    assert is_open(serving, channel)


def test_a_client_whose_doorbell_is_gone_is_refused_and_unmapped(serving: Serving, client: BareClient, log: list[str]) -> None:
    with pytest.raises(ChannelError, match="does not exist"):
        serving.channels.open(client.opening(), Lane.SHM, Doorbell.SEM)
    assert log == ["mapped", "unmapped"]


def test_a_client_whose_segment_is_gone_is_refused(serving: Serving, client: BareClient) -> None:
    absent = BareClient(client.instance, "0123456789abcdef", client.segment)
    opening = absent.opening(segment=client.segment.name.replace(client.id, absent.id))
    with pytest.raises(SegmentError, match="does not exist"):
        opened(serving, opening)


def test_a_client_that_still_holds_its_doorbell_is_not_gone_whatever_the_broker_says(
    serving: Serving, client: BareClient, log: list[str]
) -> None:
    """H5."""
    path = names.bell_path(names.bell_name(client.instance, client.id))
    Path(path).touch()
    hold = Hold.on(path)
    try:
        channel = opened(serving, client.opening())
        serving.channels.drop_client(client.id)
        assert is_open(serving, channel)
        hold.release()
        serving.channels.drop_client(client.id)
        assert not is_open(serving, channel)
    finally:
        os.unlink(path)


def test_all_channels_of_a_client_that_is_gone_are_dropped_and_no_other(
    serving: Serving, client: BareClient, new_client: Callable[[], BareClient], log: list[str]
) -> None:
    gone = [opened(serving, client.opening(index)) for index in (0, 1)]
    other = opened(serving, new_client().opening())
    serving.channels.drop_client(client.id)
    serving.frames.make_changes()
    assert not any(is_open(serving, channel) for channel in gone)
    assert is_open(serving, other)
    assert log == ["mapped", "mapped", "unmapped"]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_channels_of_a_process_that_has_ended_are_dropped(serving: Serving, client: BareClient, process: subprocess.Popen[bytes]) -> None:
    own = opened(serving, client.opening(0))
    its = opened(serving, client.opening(1, process=process_of(process.pid)))
    serving.channels.drop_dead()
    assert is_open(serving, its)
    process.kill()
    process.wait()
    serving.channels.drop_dead()
    assert [is_open(serving, channel) for channel in (own, its)] == [True, False]


def test_calls_of_closed_channels_are_counted_on(serving: Serving, client: BareClient) -> None:
    first, second = opened(serving, client.opening(0)), opened(serving, client.opening(1))
    first.counters.calls, first.counters.errors = 5, 1
    second.counters.calls = 3
    assert serving.channels.totals() == (8, 1)
    serving.channels.drop(first)
    assert serving.channels.totals() == (8, 1)


def test_numbers_are_not_told_twice(serving: Serving, client: BareClient) -> None:
    numbers = {opened(serving, client.opening(index)).number for index in range(GEOMETRY.channel_count)}
    numbers |= {opened(serving, client.opening(index)).number for index in range(GEOMETRY.channel_count)}
    assert len(numbers) == 2 * GEOMETRY.channel_count
    with pytest.raises(ChannelError, match="channel 1 is not open on this worker"):
        serving.channels.find(1)
