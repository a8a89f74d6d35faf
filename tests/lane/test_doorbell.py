"""Doorbells: who is woken, who sleeps how long, and that no frame is missed between looking and blocking. D1 to D3.

A lost ring is healed by the next look, ``RECHECK_SECONDS`` later. Where a test must see it, that bound is raised above the test's own
deadline: then a lost ring ends the test.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import posix_ipc
import pytest
import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.lane import doorbell, python_ends, shm_lane, waiter
from shmbroker.lane.completion_frames import Completion
from shmbroker.lane.doorbell import RECHECK_SECONDS, PollingBell, SemaphoreBell, fence
from shmbroker.lane.frames import FrameTemplate, Taken, taken_of
from shmbroker.lane.shm_lane import CLIENT_SLEEPING, Bell, ShmClientLane, ShmWorkerLane, clear_channel
from shmbroker.lane.submission_reader import SubmissionReader
from shmbroker.lane.waiter import Waiter
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.layout import ChannelHeader, SegmentHeader
from shmbroker.memory.segment import Segment
from shmbroker.settings.kinds import Doorbell, Lane
from tests.conftest import END_SECONDS, SegmentOf, StartChild

GEOMETRY = Geometry(arena_bytes=layout.PAGE, channel_count=2, depth=2)

NEVER_SECONDS = 600.0
"""Put for the recheck bound: nobody is healed by it in time."""

DEADLINE_SECONDS = 40.0
"""Of a whole test with two processes: many times what it takes."""

ROUNDS = 5000

BellNames = tuple[str, str]
"""The POSIX names of the client's and the worker's semaphore."""


class RecordingBell(SemaphoreBell):
    """Notes what is asked of it, and what :attr:`on_wait` does while the waiter is blocked."""

    __slots__ = ("on_wait", "rung", "waits")

    def __init__(self, on_wait: Callable[[], object] = lambda: None) -> None:
        self.waits: list[float] = []
        self.rung = 0
        self.on_wait = on_wait

    def ring(self) -> None:
        self.rung += 1

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.on_wait()

    def close(self) -> None:
        pass


@pytest.fixture(params=["python", "compiled"], autouse=True)
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything here holds for the ends in Python and for the compiled ones alike."""
    flavour = str(request.param)
    source = python_ends if flavour == "python" else pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    for name in ("SubmissionSender", "SubmissionReceiver", "CompletionSender", "CompletionReceiver"):
        monkeypatch.setattr(shm_lane, name, getattr(source, name))
    monkeypatch.setattr(waiter, "spin", source.spin)
    return flavour


@pytest.fixture
def bell_names(instance: str) -> Iterator[BellNames]:
    """Two semaphores, as the broker makes them."""
    made = (names.bell_name(instance, names.new_id()), names.bell_name(instance, names.new_id()))
    with contextlib.ExitStack() as undo:
        for name in made:
            posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=0).close()
            undo.callback(posix_ipc.unlink_semaphore, name)
        yield made


@pytest.fixture
def segment(segment_of: SegmentOf) -> Segment:
    return segment_of(GEOMETRY)


@pytest.fixture
def words() -> memoryview:
    """Words of private memory, for waiters that no peer looks at."""
    return memoryview(bytearray(64)).cast("Q")


@pytest.fixture
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost ring is not healed; forked children inherit it."""
    monkeypatch.setattr(waiter, "RECHECK_SECONDS", NEVER_SECONDS)


def _wait(waiter: Waiter, ready: Callable[[], bool], sleeping: list[tuple[memoryview, int]], seconds: float) -> bool:
    """Where nothing but ``ready`` tells that something came."""
    waiter.sleeping = sleeping
    return waiter.wait(ready, (), seconds)


def _client_sleeping(segment: Segment) -> tuple[memoryview, int]:
    return segment.words, CLIENT_SLEEPING // 8


# --- waiting ---------------------------------------------------------------------------------------------------------------------------


def _bells(bell_names: BellNames) -> list[SemaphoreBell | PollingBell]:
    return [SemaphoreBell(bell_names[0]), PollingBell()]


def test_who_is_not_rung_for_is_told_false_after_the_timeout(bell_names: BellNames, words: memoryview) -> None:
    for bell in _bells(bell_names):
        for spin in (0.0, 50e-6):
            assert _wait(Waiter(bell, spin), lambda: False, [(words, 0)], 0.005) is False
        assert _wait(Waiter(bell), lambda: False, [(words, 0)], 0.0) is False
        bell.close()


def test_who_is_ready_at_once_neither_spins_nor_sleeps(segment: Segment) -> None:
    bell = RecordingBell()
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    _submit(client, 1)
    assert Waiter(bell, NEVER_SECONDS, [worker.sleeping]).wait(worker.ready, (worker.receiver,), NEVER_SECONDS)
    assert bell.waits == []


def test_what_comes_while_spinning_is_seen_without_sleeping_and_without_a_ring(segment: Segment) -> None:
    """Other threads run meanwhile, and nobody need ring while the waiter looks."""
    bell, peers = RecordingBell(), RecordingBell()
    client, worker = ShmClientLane(segment, 0, peers), ShmWorkerLane(segment, 0, RecordingBell())
    for call_id in range(50):
        thread = threading.Thread(target=_submit, args=(client, call_id))
        waiter = Waiter(bell, NEVER_SECONDS, [worker.sleeping])
        thread.start()
        assert waiter.wait(worker.ready, (worker.receiver,), NEVER_SECONDS)
        assert _call_id(worker.take()) == call_id
        thread.join()
    assert (bell.waits, peers.rung) == ([], 0)


def test_what_comes_on_any_of_several_channels_ends_the_spinning(segment: Segment) -> None:
    lanes = [(ShmClientLane(segment, i, RecordingBell()), ShmWorkerLane(segment, i, RecordingBell())) for i in range(2)]
    receivers = tuple(worker.receiver for _, worker in lanes)
    for client, worker in lanes:
        assert not _spin(receivers, 0.001)
        _submit(client, 1)
        assert _spin(receivers, NEVER_SECONDS)
        worker.take()


def _spin(receivers: tuple[python_ends.Receiver, ...], seconds: float) -> bool:
    return waiter.spin(receivers, seconds)


def test_spinning_does_not_outlast_the_timeout(segment: Segment) -> None:
    bell = RecordingBell()
    worker = ShmWorkerLane(segment, 0, RecordingBell())
    assert Waiter(bell, NEVER_SECONDS, [worker.sleeping]).wait(worker.ready, (worker.receiver,), 0.001) is False
    assert bell.waits == [0.001]


@pytest.mark.parametrize("asked", [0.0, 0.001, RECHECK_SECONDS, RECHECK_SECONDS * 2, 1e9, float("inf")])
def test_no_block_lasts_longer_than_the_recheck_bound(words: memoryview, asked: float) -> None:
    """D3."""
    bell = RecordingBell()
    assert _wait(Waiter(bell, 0.0), lambda: False, [(words, 0)], asked) is False
    assert bell.waits == [min(asked, RECHECK_SECONDS)]


def test_polling_ends_at_the_recheck_bound_too(monkeypatch: pytest.MonkeyPatch, words: memoryview) -> None:
    """D3."""
    monkeypatch.setattr(waiter, "RECHECK_SECONDS", 0.003)
    assert _wait(Waiter(PollingBell(), 0.0), lambda: False, [(words, 0)], 1e9) is False


def test_the_sleeping_words_are_set_only_while_blocked_and_looked_at_again_in_between(words: memoryview) -> None:
    """D1: word first, then another look, then the bell; one word for each peer that may ring."""
    seen: list[tuple[str, int, int]] = []
    bell = RecordingBell(lambda: seen.append(("block", words[1], words[4])))

    def ready() -> bool:
        seen.append(("look", words[1], words[4]))
        return False

    _wait(Waiter(bell, 0.0), ready, [(words, 1), (words, 4)], 0.01)
    assert seen == [("look", 0, 0), ("look", 1, 1), ("block", 1, 1), ("look", 0, 0)]
    assert words.tolist() == [0] * 8


def test_a_full_fence_stands_between_the_word_and_the_look(monkeypatch: pytest.MonkeyPatch, words: memoryview) -> None:
    """D1."""
    order: list[str] = []
    monkeypatch.setattr(waiter, "fence", lambda: order.append(f"fence, word {words[0]}"))
    _wait(Waiter(RecordingBell(lambda: order.append("block")), 0.0), lambda: bool(order.append("look")), [(words, 0)], 0.01)
    assert order == ["look", "fence, word 1", "look", "block", "look"]


def test_the_sleeping_words_are_cleared_also_when_looking_or_blocking_fails(words: memoryview) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _wait(Waiter(RecordingBell(interrupt), 0.0), lambda: False, [(words, 0)], 1.0)
    assert words[0] == 0
    with pytest.raises(KeyboardInterrupt):
        _wait(Waiter(RecordingBell(), 0.0), lambda: interrupt() if words[0] else False, [(words, 0)], 1.0)
    assert words[0] == 0


def test_what_comes_between_the_first_look_and_the_word_is_seen_without_blocking(words: memoryview) -> None:
    """D1: the writer saw nobody sleep, so it did not ring."""
    bell = RecordingBell()
    frames: list[str] = []
    looks = 0

    def ready() -> bool:
        nonlocal looks
        looks += 1
        found = bool(frames)
        if looks == 1:
            frames.append("published after this look")
        return found

    assert _wait(Waiter(bell, 0.0), ready, [(words, 0)], NEVER_SECONDS)
    assert bell.waits == []


@pytest.mark.usefixtures("no_recheck")
def test_what_comes_between_the_last_look_and_blocking_rings_and_is_not_missed(bell_names: BellNames, words: memoryview) -> None:
    """D1: the writer sees the word, and a semaphore remembers that it was rung."""
    own, peers = SemaphoreBell(bell_names[0]), SemaphoreBell(bell_names[0])
    frames: list[str] = []

    def ready() -> bool:
        found = bool(frames)
        if words[0] and not found:
            frames.append("published after this look")
            peers.ring()
        return found

    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(_wait(Waiter(own, 0.0), ready, [(words, 0)], NEVER_SECONDS)), daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert outcome == [True]
    own.close()
    peers.close()


def test_a_ring_for_nothing_wakes_and_the_state_decides(bell_names: BellNames, words: memoryview) -> None:
    """D2."""
    bell = SemaphoreBell(bell_names[0])
    bell.ring()
    assert _wait(Waiter(bell, 0.0), lambda: False, [(words, 0)], NEVER_SECONDS) is False
    bell.close()


def test_polling_sets_no_word_for_nobody_rings(words: memoryview) -> None:
    seen: list[int] = []
    _wait(Waiter(PollingBell(), 0.0), lambda: bool(seen.append(words[0])), [(words, 0)], 0.003)
    assert set(seen) == {0}
    assert len(seen) > 2


def test_naps_grow_to_a_millisecond_and_begin_short_again_after_something_came(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(doorbell.time, "sleep", naps.append)
    bell = PollingBell()
    for _ in range(10):
        bell.wait(1.0)
    assert naps[0] == 20e-6
    assert naps == sorted(naps)
    assert naps[-1] == 1e-3
    bell.wait(1e-5)
    assert naps[-1] == 1e-5
    bell.rested()
    bell.wait(1.0)
    assert naps[-1] == naps[0]
    bell.ring()
    bell.close()


def test_closing_a_bell_twice_does_nothing_and_leaves_its_name_and_its_peers(bell_names: BellNames) -> None:
    for bell in _bells(bell_names):
        bell.close()
        bell.close()
    own, peers = SemaphoreBell(bell_names[0]), SemaphoreBell(bell_names[0])
    own.close()
    own.close()
    peers.ring()
    peers.close()
    again = posix_ipc.Semaphore(bell_names[0])
    assert again.value == 1
    again.close()


def test_closing_a_lane_twice_does_nothing(segment: Segment, bell_names: BellNames) -> None:
    for lane in (ShmClientLane(segment, 0, SemaphoreBell(bell_names[0])), ShmWorkerLane(segment, 0, SemaphoreBell(bell_names[1]))):
        lane.close()
        lane.close()


def test_bells_tell_their_kind(bell_names: BellNames) -> None:
    assert [bell.kind for bell in _bells(bell_names)] == [Doorbell.SEM, Doorbell.POLL]


def test_a_fence_may_be_passed_by_many_threads() -> None:
    threads = [threading.Thread(target=lambda: [fence() for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)


# --- lanes: who rings for whom ---------------------------------------------------------------------------------------------------------

_NOTHING = FrameTemplate(1, [], [])


def _submit(lane: ShmClientLane, call_id: int) -> bool:
    return lane.submit(_NOTHING, call_id, 0, 0, [], [])


def _completion(call_id: int, text: bytes = b"") -> Completion:
    return Completion(call_id, layout.Status.OP_ERROR if text else layout.Status.OK, call_id + 1, call_id + 2, text)


def _call_id(taken: Taken | None) -> int:
    assert taken is not None
    call_id = layout.SubmissionFrame.from_buffer_copy(taken[-1]).call_id
    assert taken[0] == call_id
    return int(call_id)


def test_a_call_goes_to_the_worker_and_its_completion_comes_back(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 1, RecordingBell()), ShmWorkerLane(segment, 1, RecordingBell())
    for call_id in range(1, 20):
        assert not worker.ready()
        assert _submit(client, call_id)
        assert worker.ready()
        assert _call_id(worker.take()) == call_id
        assert not client.ready()
        assert worker.complete(_completion(call_id))
        assert client.ready()
        assert client.take() == _completion(call_id)
        assert client.take() is None
    assert (client.depth, client.kind, client.doorbell) == (GEOMETRY.depth, Lane.SHM, Doorbell.SEM)


def test_channels_of_one_segment_do_not_touch_each_other(segment: Segment) -> None:
    lanes = [(ShmClientLane(segment, i, RecordingBell()), ShmWorkerLane(segment, i, RecordingBell())) for i in range(2)]
    for call_id in range(1, 10):
        for i, (client, _) in enumerate(lanes):
            assert _submit(client, call_id * 10 + i)
        for i, (_, worker) in enumerate(lanes):
            assert _call_id(worker.take()) == call_id * 10 + i
            assert worker.complete(_completion(call_id * 10 + i))
        for i, (client, _) in enumerate(lanes):
            assert client.take() == _completion(call_id * 10 + i)


def test_only_a_sleeper_is_rung_for(segment: Segment) -> None:
    """D1, the writer's part: one bell for each process, one word for each channel of a worker and one for the client."""
    clients_bell, workers_bell = RecordingBell(), RecordingBell()
    client, worker = ShmClientLane(segment, 1, workers_bell), ShmWorkerLane(segment, 1, clients_bell)
    _submit(client, 1)
    worker.complete(_completion(1))
    assert (workers_bell.rung, clients_bell.rung) == (0, 0)
    words, index = worker.sleeping
    words[index] = 1
    _submit(client, 2)
    assert (workers_bell.rung, clients_bell.rung) == (1, 0)
    words[index] = 0
    words, index = _client_sleeping(segment)
    words[index] = 1
    worker.complete(_completion(2))
    assert (workers_bell.rung, clients_bell.rung) == (1, 1)


def test_a_sleeper_is_rung_for_once_also_when_it_is_nudged_before_the_frame_comes(segment: Segment) -> None:
    """D4."""
    bell = RecordingBell()
    client, worker = ShmClientLane(segment, 1, bell), ShmWorkerLane(segment, 1, RecordingBell())
    words, index = worker.sleeping
    client.nudge()
    assert bell.rung == 0, "nobody sleeps"
    words[index] = 1
    client.nudge()
    client.nudge()
    assert (bell.rung, words[index]) == (1, 0)
    _submit(client, 1)
    assert bell.rung == 1
    words[index] = 1
    _submit(client, 2)
    assert (bell.rung, words[index]) == (2, 0)


def test_a_frame_is_published_before_the_word_is_looked_at(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1: publish, fence, look. (Compiled: the three lines of ``commit`` in ``_ends.c``.)"""
    order: list[str] = []
    client = ShmClientLane(segment, 0, RecordingBell())
    worker = ShmWorkerLane(segment, 0, RecordingBell())
    monkeypatch.setattr(python_ends, "fence", lambda: order.append(f"fence, published {worker.ready()}"))
    _submit(client, 1)
    assert order == (["fence, published True"] if shm_lane.SubmissionSender is python_ends.SubmissionSender else [])


def test_the_words_to_sleep_under_are_those_of_the_layout(segment: Segment) -> None:
    worker = ShmWorkerLane(segment, 1, RecordingBell())
    area = GEOMETRY.channel_offset(1)
    assert layout.offset_of(SegmentHeader, "client_sleeping") == CLIENT_SLEEPING
    assert worker.sleeping[1] * 8 == area + layout.offset_of(ChannelHeader, "worker_sleeping")


def test_a_client_that_leaves_its_completions_lying_is_told_of_no_more(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    assert [worker.complete(_completion(i)) for i in range(4)] == [True, True, False, False]
    assert [client.take(), client.take(), client.take()] == [_completion(0), _completion(1), None]
    assert worker.complete(_completion(9))


def test_a_full_submission_queue_has_nothing_to_claim(segment: Segment) -> None:
    client = ShmClientLane(segment, 0, RecordingBell())
    assert [_submit(client, i) for i in range(4)] == [True, True, False, False]


def test_completions_with_and_without_a_text_come_back_whole_and_in_order(segment: Segment) -> None:
    """A slot that held a long text before tells nothing of it."""
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    for call_id in range(1, 20):
        text = b"x" * (0, layout.TEXT_BYTES, 0, 1, 0)[call_id % 5]
        assert worker.complete(_completion(call_id, text))
        assert client.take() == _completion(call_id, text)
    assert client.take() is None


def test_calls_of_several_kinds_in_one_queue_leave_nothing_of_each_other(segment: Segment) -> None:
    """Each slot remembers the template that was written into it last, and no other slot's."""
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    reader = SubmissionReader(GEOMETRY.arena_offset, GEOMETRY.total_bytes)
    one = (TensorSpec((4,), torch.float32), (1,))
    templates = [
        FrameTemplate(1, [one] * 3, [one] * 2),
        FrameTemplate(2, [one], [], b"\x80"),
        FrameTemplate(3, [], []),
        FrameTemplate(4, [], [one]),
    ]
    first = GEOMETRY.arena_offset
    for call_id, index in enumerate([0, 1, 2, 3, 0, 0, 0, 2, 2, 1, 3, 0, 1, 1, 1, 0, 3, 3], start=1):
        template = templates[index]
        count = template.tensor_count
        offsets, generations = [first + 16 * (call_id + i) for i in range(count)], [100 * call_id + i for i in range(count)]
        assert client.submit(template, call_id, 0, call_id, offsets, generations)
        taken = worker.take()
        assert taken is not None
        assert taken == taken_of(taken[-1])
        call = reader.read(taken[-1])
        assert (call.call_id, call.op_id, call.submitted_ns) == (call_id, index + 1, call_id)
        assert (len(call.inputs), len(call.outputs), call.metadata) == [(3, 2, b""), (1, 0, b"\x80"), (0, 0, b""), (0, 1, b"")][index]
        assert [tensor.offset for tensor in (*call.inputs, *call.outputs)] == offsets
        assert call.generations == tuple(generations)


def test_a_completion_that_cannot_be_one_is_passed_over(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    worker.complete(_completion(1))
    worker.complete(_completion(2))
    first = GEOMETRY.channel_offset(0) + GEOMETRY.completions_offset
    frame = layout.CompletionFrame.from_buffer(segment.map, first)
    frame.text_bytes = 0xFFFFFFFF
    del frame
    assert client.take() == _completion(2)
    assert client.take() is None


def test_a_cleared_channel_is_as_new_and_its_neighbour_untouched(segment: Segment) -> None:
    other = ShmClientLane(segment, 0, RecordingBell())
    _submit(other, 1)
    before = segment.map[: GEOMETRY.channel_offset(1)]
    client, worker = ShmClientLane(segment, 1, RecordingBell()), ShmWorkerLane(segment, 1, RecordingBell())
    _submit(client, 1)
    worker.take()
    clear_channel(segment, 1)
    assert segment.map[: GEOMETRY.channel_offset(1)] == before
    assert not any(segment.map[GEOMETRY.channel_offset(1) : GEOMETRY.channel_offset(2)])
    client, worker = ShmClientLane(segment, 1, RecordingBell()), ShmWorkerLane(segment, 1, RecordingBell())
    assert worker.take() is None
    assert _submit(client, 2)
    assert _call_id(worker.take()) == 2


# --- between processes -----------------------------------------------------------------------------------------------------------------


def _bell(name: str | None) -> Bell:
    return PollingBell() if name is None else SemaphoreBell(name)


def _await(waiter: Waiter, ready: Callable[[], bool], sleeping: tuple[memoryview, int], until: float) -> None:
    while not _wait(waiter, ready, [sleeping], max(0.0, until - time.monotonic())):
        assert time.monotonic() < until, "a ring was lost"


def _answer_all(segment_name: str, own_bell: str | None, clients_bell: str | None, rounds: int) -> None:
    segment = Segment.attach(segment_name, hold=False)
    lane = ShmWorkerLane(segment, 1, _bell(clients_bell))
    waiter = Waiter(_bell(own_bell), spin_seconds=0.0)
    until = time.monotonic() + DEADLINE_SECONDS
    for _ in range(rounds):
        _await(waiter, lane.ready, lane.sleeping, until)
        assert lane.complete(_completion(_call_id(lane.take())))


def _ping_pong(segment: Segment, start_child: StartChild, clients_bell: str | None, workers_bell: str | None, rounds: int) -> None:
    child = start_child(_answer_all, segment.name, workers_bell, clients_bell, rounds)
    lane = ShmClientLane(segment, 1, _bell(workers_bell))
    waiter = Waiter(_bell(clients_bell), spin_seconds=0.0)
    until = time.monotonic() + DEADLINE_SECONDS
    for call_id in range(1, rounds + 1):
        if call_id % 2:
            lane.nudge()  # the worker may wake, find nothing, and sleep again before the frame is there (D4)
        assert _submit(lane, call_id)
        _await(waiter, lane.ready, _client_sleeping(segment), until)
        assert lane.take() == _completion(call_id)
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
    woken = _wait(Waiter(SemaphoreBell(bell), spin_seconds=0.0), lambda: bool(segment.words[word]), [(segment.words, client_sleeping)], 1e6)
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
            _await(waiter, client.ready, _client_sleeping(segment), until)
            taken.append(client.take())
            answered.release()

    until = time.monotonic() + DEADLINE_SECONDS
    answered = threading.Semaphore(0)
    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    for call_id in range(200):
        assert worker.complete(_completion(call_id))
        assert answered.acquire(timeout=DEADLINE_SECONDS)
    thread.join(END_SECONDS)
    assert taken == [_completion(call_id) for call_id in range(200)]
