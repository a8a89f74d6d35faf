"""The frame loop: one call at a time on all lanes, changes between calls, and frames that nobody may send."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shmbroker.lane.zmq_lane import new_token
from shmbroker.memory.layout import Status
from shmbroker.worker.backlog import Backlog
from shmbroker.worker.batching import Batching
from tests.processes import wait_until
from tests.worker.conftest import (
    GEOMETRY,
    SECONDS,
    BareClient,
    Serving,
    WatchedMemory,
    bound,
    double,
    next_completion,
    serving_with,
    submit,
)


class Gate:
    """An op that writes down when it begins and ends, and ends when it may."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> None:
        self.log.append("begin")
        self.begun.release()
        assert self.may_end.acquire(timeout=SECONDS)
        self.log.append("end")

    def wait_until_begun(self) -> None:
        assert self.begun.acquire(timeout=SECONDS)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_frames_of_both_lanes_are_run_and_answered(serving: Serving, client: BareClient) -> None:
    opened = [serving.open_shm(client, 0), serving.open_zmq(client, 1)]
    serving.begin()
    for channel, lane in opened:
        template = bound(channel, double)
        for call_id in (1, 2, 3):
            submit(lane, template, call_id)
            assert next_completion(lane)[:2] == (call_id, Status.OK)
        assert channel.counters.calls == 3
        lane.close()


def test_a_change_runs_between_two_calls(serving: Serving, client: BareClient, gate: Gate) -> None:
    channel, lane = serving.open_shm(client)
    template = bound(channel, gate)
    serving.begin()
    submit(lane, template, 1)
    submit(lane, template, 2)
    gate.wait_until_begun()
    serving.frames.change(lambda: gate.log.append("change"))
    gate.may_end.release(2)
    assert [next_completion(lane)[0], next_completion(lane)[0]] == [1, 2]
    assert gate.log == ["begin", "end", "change", "begin", "end"]
    lane.close()


def test_calls_of_two_lanes_never_run_at_the_same_time(serving: Serving, client: BareClient, gate: Gate) -> None:
    (shm_channel, shm_lane), (zmq_channel, zmq_lane) = serving.open_shm(client, 0), serving.open_zmq(client, 1)
    serving.begin()
    submit(shm_lane, bound(shm_channel, gate), 1)
    gate.wait_until_begun()
    submit(zmq_lane, bound(zmq_channel, gate), 2)
    assert not gate.begun.acquire(timeout=0.3)
    gate.may_end.release(2)
    assert next_completion(shm_lane)[0] == 1
    assert next_completion(zmq_lane)[0] == 2
    assert gate.log == ["begin", "end", "begin", "end"]
    shm_lane.close()
    zmq_lane.close()


def test_a_frame_with_a_token_that_no_channel_has_is_dropped(
    serving: Serving, client: BareClient, caplog: pytest.LogCaptureFixture
) -> None:
    channel, lane = serving.open_zmq(client)
    template = bound(channel, double)
    stranger = serving.zmq_lane(new_token())
    submit(stranger, template, 7)
    wait_until(lambda: "a frame with a token that no channel has was dropped" in caplog.text, SECONDS)
    submit(lane, template, 1)
    assert next_completion(lane)[0] == 1
    assert stranger.take() is None
    assert channel.counters.calls == 1
    stranger.close()
    lane.close()


def test_the_token_of_a_channel_on_the_shm_lane_opens_nothing(serving: Serving, client: BareClient) -> None:
    shm_channel, shm_lane = serving.open_shm(client, 0)
    zmq_channel, zmq_lane = serving.open_zmq(client, 1)
    nameless = serving.zmq_lane(shm_channel.token)
    submit(nameless, bound(shm_channel, double), 7)
    submit(zmq_lane, bound(zmq_channel, double), 1)
    assert next_completion(zmq_lane)[0] == 1
    assert shm_channel.counters.calls == 0
    for lane in (nameless, zmq_lane, shm_lane):
        lane.close()


def test_a_channel_is_not_closed_while_a_call_of_it_runs(serving: Serving, client: BareClient, gate: Gate) -> None:
    channel, lane = serving.open_zmq(client)
    serving.begin()
    submit(lane, bound(channel, gate), 1)
    gate.wait_until_begun()
    serving.channels.drop(channel)
    time.sleep(0.3)
    assert serving.memory.log == ["mapped"]
    gate.may_end.release()
    assert next_completion(lane)[0] == 1
    wait_until(lambda: serving.memory.log == ["mapped", "unmapped"], SECONDS)
    lane.close()


def test_a_frame_whose_channel_is_dropped_while_it_waits_for_another_call_is_not_run(
    serving: Serving, client: BareClient, gate: Gate
) -> None:
    (running, running_lane), (waiting, waiting_lane) = serving.open_shm(client, 0), serving.open_zmq(client, 1)
    last, last_lane = serving.open_zmq(client, 2)
    serving.begin()
    submit(running_lane, bound(running, gate), 1)
    gate.wait_until_begun()
    submit(waiting_lane, bound(waiting, double), 2)
    time.sleep(0.2)  # for the zmq thread to take it
    serving.channels.drop(waiting)
    gate.may_end.release()
    assert next_completion(running_lane)[0] == 1
    submit(last_lane, bound(last, double), 3)
    assert next_completion(last_lane)[0] == 3
    assert waiting.counters.calls == 0
    assert waiting_lane.take() is None
    for lane in (running_lane, waiting_lane, last_lane):
        lane.close()


def test_a_client_that_leaves_its_completion_queue_full_is_served_no_more(
    serving: Serving, client: BareClient, new_client: Callable[[], BareClient]
) -> None:
    greedy, greedy_lane = serving.open_shm(client)
    fair, fair_lane = serving.open_shm(new_client())
    greedy_template, fair_template = bound(greedy, double), bound(fair, double)
    serving.begin()
    for call_id in range(GEOMETRY.depth + 1):
        submit(greedy_lane, greedy_template, call_id)
        wait_until(lambda: greedy.counters.calls == call_id + 1, SECONDS)  # noqa: B023
    wait_until(lambda: not serving.frames.broken.empty(), SECONDS)
    submit(greedy_lane, greedy_template, 99)
    submit(fair_lane, fair_template, 1)
    assert next_completion(fair_lane)[0] == 1
    assert greedy.counters.calls == GEOMETRY.depth + 1
    serving.channels.drop_broken()
    wait_until(lambda: serving.memory.log == ["mapped", "mapped", "unmapped"], SECONDS)
    greedy_lane.close()
    fair_lane.close()


def test_what_has_come_when_the_loop_is_told_to_stop_is_refused(serving: Serving, client: BareClient) -> None:
    channel, lane = serving.open_shm(client)
    template = bound(channel, double)
    serving.frames.make_changes()
    submit(lane, template, 1)
    submit(lane, template, 2)
    serving.stop.request()
    serving.frames.serve_shm()
    assert [next_completion(lane)[:2], next_completion(lane)[:2]] == [(1, Status.DRAINING), (2, Status.DRAINING)]
    lane.close()


class Launch:
    """A call whose device works until it is let go."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def wait(self) -> None:
        assert self.done.wait(SECONDS)


def test_no_change_runs_while_a_device_works_on_a_call(serving_device: Serving, client: BareClient) -> None:
    """The next call is launched meanwhile, and answered after the one before."""
    serving, launches, log = serving_device, [Launch(), Launch()], []
    channel, lane = serving.open_shm(client)
    left = iter(launches)
    template = bound(channel, lambda x, *, out: next(left))
    serving.begin()
    submit(lane, template, 1)
    submit(lane, template, 2)
    wait_until(lambda: channel.counters.calls == 2, SECONDS)
    serving.frames.change(lambda: log.append([launch.done.is_set() for launch in launches]))
    launches[1].done.set()
    time.sleep(0.3)
    assert log == []
    assert lane.take() is None
    launches[0].done.set()
    assert [next_completion(lane)[0], next_completion(lane)[0]] == [1, 2]
    wait_until(lambda: bool(log), SECONDS)
    assert log == [[True, True]]
    lane.close()


def test_what_a_device_works_on_when_the_loop_is_told_to_stop_is_answered(serving_device: Serving, client: BareClient) -> None:
    serving, launch = serving_device, Launch()
    channel, lane = serving.open_shm(client)
    serving.begin()
    submit(lane, bound(channel, lambda x, *, out: launch), 1)
    wait_until(lambda: channel.counters.calls == 1, SECONDS)
    serving.stop.request()
    launch.done.set()
    assert next_completion(lane)[:2] == (1, Status.OK)
    lane.close()


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("kind", ["backlog", "batching"])
def test_a_client_with_more_calls_on_their_way_than_it_may_have_is_closed(
    instance: str, new_client: Callable[[], BareClient], gate: Gate, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Where frames wait in their channel, its queue has room again: who fills that too would keep the worker from ever sleeping."""
    options: dict[str, Any] = {"backlog": Backlog(1 << 20)} if kind == "backlog" else {"batching": Batching("all")}
    with serving_with(instance, WatchedMemory(), **options) as serving:
        (channel, lane), (_, other) = [serving.open_shm(new_client()) for _ in range(2)]  # with one client frames are run as they come
        template, call_ids = bound(channel, gate), itertools.count(1)
        serving.begin()
        begin = GEOMETRY.arena_offset
        while serving.frames.broken.empty():
            while lane.submit(template, next(call_ids), 0, 1, [begin, begin + 256], [0, 0]):
                pass
            gate.may_end.release()
            lane.take()  # it does not leave its completion queue full
            time.sleep(0.001)
        assert serving.frames.broken.get() is channel
        assert "has more calls on their way than its channel may have: its channel is closed" in caplog.text
        gate.may_end.release(GEOMETRY.depth * 3)
        lane.close()
        other.close()
