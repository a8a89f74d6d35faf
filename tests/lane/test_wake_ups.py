"""Two sides that sleep until they are rung for, in processes and threads of their own: no wake-up is lost. Invariants D1 and D4.

A lost ring would be healed by the next look, ``RECHECK_SECONDS`` later: here that bound is raised above the tests' own deadline, so that it ends
the test.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from shmbroker.lane.doorbell import PollingBell, SemaphoreBell
from shmbroker.lane.shm_lane import Bell, ShmClientLane, ShmWorkerLane, clear_channel
from shmbroker.lane.waiter import Waiter
from shmbroker.memory import layout
from shmbroker.memory.layout import SegmentHeader
from shmbroker.memory.segment import Segment
from tests.conftest import END_SECONDS, StartChild
from tests.lane.bells import DEADLINE_SECONDS, BellNames, RecordingBell, wait_ready
from tests.lane.empty_calls import GEOMETRY, client_sleeping, completion, id_of, submit

pytestmark = pytest.mark.usefixtures("flavour")

ROUNDS = 5000


def _bell(name: str | None) -> Bell:
    return PollingBell() if name is None else SemaphoreBell(name)


def _await(waiter: Waiter, ready: Callable[[], bool], sleeping: tuple[memoryview, int], until: float) -> None:
    while not wait_ready(waiter, ready, [sleeping], max(0.0, until - time.monotonic())):
        assert time.monotonic() < until, "a ring was lost"


def _answer_all(segment_name: str, own_bell: str | None, clients_bell: str | None, rounds: int) -> None:
    segment = Segment.attach(segment_name, hold=False)
    lane = ShmWorkerLane(segment, 1, _bell(clients_bell))
    waiter = Waiter(_bell(own_bell), spin_seconds=0.0)
    until = time.monotonic() + DEADLINE_SECONDS
    for _ in range(rounds):
        _await(waiter, lane.ready, lane.sleeping, until)
        assert lane.complete(completion(id_of(lane.take())))


def _ping_pong(segment: Segment, start_child: StartChild, clients_bell: str | None, workers_bell: str | None, rounds: int) -> None:
    child = start_child(_answer_all, segment.name, workers_bell, clients_bell, rounds)
    lane = ShmClientLane(segment, 1, _bell(workers_bell))
    waiter = Waiter(_bell(clients_bell), spin_seconds=0.0)
    until = time.monotonic() + DEADLINE_SECONDS
    for call_id in range(1, rounds + 1):
        if call_id % 2:
            lane.nudge()  # the worker may wake, find nothing, and sleep again before the frame is there (D4)
        assert submit(lane, call_id)
        _await(waiter, lane.ready, client_sleeping(segment), until)
        assert lane.take() == completion(call_id)
    child.join(END_SECONDS)
    assert child.exitcode == 0
    lane.close()


@pytest.mark.usefixtures("no_recheck")
def test_no_frame_is_missed_between_looking_and_blocking_in_thousands_of_rounds(
    segment: Segment, start_child: StartChild, bell_names: BellNames
) -> None:
    """D1: both sides block at once, every time; one ring lost in either direction would outlast the deadline."""
    _ping_pong(segment, start_child, *bell_names, ROUNDS)


@pytest.mark.usefixtures("no_recheck")
def test_polling_on_both_sides_misses_nothing_either(segment: Segment, start_child: StartChild) -> None:
    _ping_pong(segment, start_child, None, None, ROUNDS)


@pytest.mark.usefixtures("no_recheck")
def test_one_side_may_poll_while_the_other_is_rung(segment: Segment, start_child: StartChild, bell_names: BellNames) -> None:
    _ping_pong(segment, start_child, bell_names[0], None, 500)
    clear_channel(segment, 1)
    _ping_pong(segment, start_child, None, bell_names[1], 500)


def _wait_for_word(segment_name: str, bell: str) -> None:
    segment = Segment.attach(segment_name, hold=False)
    client_sleeping = layout.offset_of(SegmentHeader, "client_sleeping") // 8
    word = GEOMETRY.arena_offset // 8
    woken = wait_ready(
        Waiter(SemaphoreBell(bell), spin_seconds=0.0), lambda: bool(segment.words[word]), [(segment.words, client_sleeping)], 1e6
    )
    os._exit(0 if woken and not segment.words[client_sleeping] else 1)


@pytest.mark.usefixtures("no_recheck")
def test_a_sleeper_in_another_process_is_woken_by_a_ring(segment: Segment, start_child: StartChild, bell_names: BellNames) -> None:
    """D1, the sleeper's part: once its word is up, state and ring suffice."""
    child = start_child(_wait_for_word, segment.name, bell_names[0])
    client_sleeping = layout.offset_of(SegmentHeader, "client_sleeping") // 8
    until = time.monotonic() + DEADLINE_SECONDS
    while not segment.words[client_sleeping]:
        assert time.monotonic() < until
        time.sleep(0)
    bell = SemaphoreBell(bell_names[0])
    segment.words[GEOMETRY.arena_offset // 8] = 1
    bell.ring()
    child.join(DEADLINE_SECONDS)
    assert child.exitcode == 0
    bell.close()


@pytest.mark.usefixtures("no_recheck")
def test_a_sleeper_in_another_thread_is_woken_by_a_ring(segment: Segment, bell_names: BellNames) -> None:
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, SemaphoreBell(bell_names[0]))
    taken: list[object] = []

    def sleep() -> None:
        waiter = Waiter(SemaphoreBell(bell_names[0]), spin_seconds=0.0)
        for _ in range(200):
            _await(waiter, client.ready, client_sleeping(segment), until)
            taken.append(client.take())
            answered.release()

    until = time.monotonic() + DEADLINE_SECONDS
    answered = threading.Semaphore(0)
    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    for call_id in range(200):
        assert worker.complete(completion(call_id))
        assert answered.acquire(timeout=DEADLINE_SECONDS)
    thread.join(END_SECONDS)
    assert taken == [completion(call_id) for call_id in range(200)]
