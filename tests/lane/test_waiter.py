"""Waiting for frames: who looks, who sleeps under which word, and how long. Invariants D1 to D3.

A lost ring is healed by the next look, ``RECHECK_SECONDS`` later. Where a test must see it, that bound is raised above the test's own
deadline: then a lost ring ends the test.
"""

from __future__ import annotations

import threading

import pytest

from shmbroker.lane import python_ends, waiter
from shmbroker.lane.doorbell import RECHECK_SECONDS, PollingBell, SemaphoreBell
from shmbroker.lane.shm_lane import ShmClientLane, ShmWorkerLane
from shmbroker.lane.waiter import Waiter
from shmbroker.memory.segment import Segment
from tests.lane.bells import DEADLINE_SECONDS, NEVER_SECONDS, BellNames, RecordingBell, both_bells, wait_ready
from tests.lane.empty_calls import id_of, submit

pytestmark = pytest.mark.usefixtures("flavour")


def test_who_is_not_rung_for_is_told_false_after_the_timeout(bell_names: BellNames, words: memoryview) -> None:
    for bell in both_bells(bell_names):
        for spin in (0.0, 50e-6):
            assert wait_ready(Waiter(bell, spin), lambda: False, [(words, 0)], 0.005) is False
        assert wait_ready(Waiter(bell), lambda: False, [(words, 0)], 0.0) is False
        bell.close()


def test_who_is_ready_at_once_neither_spins_nor_sleeps(segment: Segment) -> None:
    bell = RecordingBell()
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    submit(client, 1)
    assert Waiter(bell, NEVER_SECONDS, [worker.sleeping]).wait(worker.ready, (worker.receiver,), NEVER_SECONDS)
    assert bell.waits == []


def test_what_comes_while_spinning_is_seen_without_sleeping_and_without_a_ring(segment: Segment) -> None:
    """Other threads run meanwhile, and nobody need ring while the waiter looks."""
    bell, peers = RecordingBell(), RecordingBell()
    client, worker = ShmClientLane(segment, 0, peers), ShmWorkerLane(segment, 0, RecordingBell())
    for call_id in range(50):
        thread = threading.Thread(target=submit, args=(client, call_id))
        waiter = Waiter(bell, NEVER_SECONDS, [worker.sleeping])
        thread.start()
        assert waiter.wait(worker.ready, (worker.receiver,), NEVER_SECONDS)
        assert id_of(worker.take()) == call_id
        thread.join()
    assert (bell.waits, peers.rung) == ([], 0)


def test_what_comes_on_any_of_several_channels_ends_the_spinning(segment: Segment) -> None:
    lanes = [(ShmClientLane(segment, i, RecordingBell()), ShmWorkerLane(segment, i, RecordingBell())) for i in range(2)]
    receivers = tuple(worker.receiver for _, worker in lanes)
    for client, worker in lanes:
        assert not _spin(receivers, 0.001)
        submit(client, 1)
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
    assert wait_ready(Waiter(bell, 0.0), lambda: False, [(words, 0)], asked) is False
    assert bell.waits == [min(asked, RECHECK_SECONDS)]


def test_polling_ends_at_the_recheck_bound_too(monkeypatch: pytest.MonkeyPatch, words: memoryview) -> None:
    """D3."""
    monkeypatch.setattr(waiter, "RECHECK_SECONDS", 0.003)
    assert wait_ready(Waiter(PollingBell(), 0.0), lambda: False, [(words, 0)], 1e9) is False


def test_the_sleeping_words_are_set_only_while_blocked_and_looked_at_again_in_between(words: memoryview) -> None:
    """D1: word first, then another look, then the bell; one word for each peer that may ring."""
    seen: list[tuple[str, int, int]] = []
    bell = RecordingBell(lambda: seen.append(("block", words[1], words[4])))

    def ready() -> bool:
        seen.append(("look", words[1], words[4]))
        return False

    wait_ready(Waiter(bell, 0.0), ready, [(words, 1), (words, 4)], 0.01)
    assert seen == [("look", 0, 0), ("look", 1, 1), ("block", 1, 1), ("look", 0, 0)]
    assert words.tolist() == [0] * 8


def test_a_full_fence_stands_between_the_word_and_the_look(monkeypatch: pytest.MonkeyPatch, words: memoryview) -> None:
    """D1. (Compiled: ``before_sleep`` of the core, which test_weak_memory.py reads.)"""
    order: list[str] = []
    monkeypatch.setattr(python_ends, "fence", lambda: order.append(f"fence, word {words[0]}"))
    wait_ready(Waiter(RecordingBell(lambda: order.append("block")), 0.0), lambda: bool(order.append("look")), [(words, 0)], 0.01)
    fences = ["fence, word 1"] if waiter.before_sleep is python_ends.before_sleep else []
    assert order == ["look", *fences, "look", "block", "look"]


def test_the_sleeping_words_are_cleared_also_when_looking_or_blocking_fails(words: memoryview) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_ready(Waiter(RecordingBell(interrupt), 0.0), lambda: False, [(words, 0)], 1.0)
    assert words[0] == 0
    with pytest.raises(KeyboardInterrupt):
        wait_ready(Waiter(RecordingBell(), 0.0), lambda: interrupt() if words[0] else False, [(words, 0)], 1.0)
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

    assert wait_ready(Waiter(bell, 0.0), ready, [(words, 0)], NEVER_SECONDS)
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
    thread = threading.Thread(target=lambda: outcome.append(wait_ready(Waiter(own, 0.0), ready, [(words, 0)], NEVER_SECONDS)), daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert outcome == [True]
    own.close()
    peers.close()


def test_a_ring_for_nothing_wakes_and_the_state_decides(bell_names: BellNames, words: memoryview) -> None:
    """D2."""
    bell = SemaphoreBell(bell_names[0])
    bell.ring()
    assert wait_ready(Waiter(bell, 0.0), lambda: False, [(words, 0)], NEVER_SECONDS) is False
    bell.close()


def test_polling_sets_no_word_for_nobody_rings(words: memoryview) -> None:
    seen: list[int] = []
    wait_ready(Waiter(PollingBell(), 0.0), lambda: bool(seen.append(words[0])), [(words, 0)], 0.003)
    assert set(seen) == {0}
    assert len(seen) > 2
