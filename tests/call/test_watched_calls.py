"""Calls that no thread waits for: a thread in the background does, until they are done or their deadlines have passed."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from shmbroker.call.completions import CompletionLoop
from shmbroker.lane.doorbell import RECHECK_SECONDS
from tests.call.fake_sources import Clock, FakeCall, FakeFuture, FakeSource, HandRungBell
from tests.threads import STUCK_SECONDS

BACKGROUND = "shmbroker-completions"
"""The name of the thread that waits for what is watched."""


def _background() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == BACKGROUND}


def test_what_is_watched_is_completed_in_the_background(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C5: its future is settled there too."""
    before = _background()
    settled = threading.Event()
    future = FakeFuture(settled.set)
    call = FakeCall(on_finish=lambda: loop.settle_later(future))
    loop.watch(call)
    blocked = bell.next_blocked()
    assert {thread.ident for thread in _background() - before} == {blocked.thread}
    source.answer(call)
    blocked.wake()
    assert settled.wait(STUCK_SECONDS)
    assert call.done
    loop.close()


def test_several_are_watched_by_one_thread_in_whatever_order_they_are_answered(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    before = _background()
    calls = [FakeCall() for _ in range(6)]
    for call in calls:
        loop.watch(call)
    for call in reversed(calls):
        blocked = bell.next_blocked()
        source.answer(call)
        blocked.wake()
    assert len(_background() - before) == 1
    loop.close()
    assert all(call.done for call in calls)
    assert set(source.readers) == {blocked.thread}


def test_watched_calls_expire_once_each_at_their_deadlines(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock
) -> None:
    """C3: and those that have none, or a later one, are watched on."""
    never, late, early = FakeCall(), FakeCall(clock.after(1.25)), FakeCall(clock.after(1.0))
    for call in (never, late, early):
        loop.watch(call)
    seen_at: dict[FakeCall, int] = {}
    while late not in seen_at:
        assert clock.now_ns <= late.deadline_ns + 1e9
        blocked = bell.next_blocked()
        assert blocked.seconds <= RECHECK_SECONDS
        for call in (late, early):
            if call.expired:
                seen_at.setdefault(call, clock.now_ns)
        if late not in seen_at:
            clock.advance(max(blocked.seconds, 0.001))
            blocked.wake()
    bound_ns = int(RECHECK_SECONDS * 1e9)
    for call in (late, early):
        assert call.deadline_ns <= seen_at[call] <= call.deadline_ns + bound_ns + 10_000_000
    source.answer(never)
    blocked.wake()
    loop.close()
    assert [(call.expired, call.done) for call in (never, late, early)] == [(0, True), (1, False), (1, False)]


def test_a_watched_call_whose_deadline_has_passed_already_expires_after_a_look(
    loop: CompletionLoop, bell: HandRungBell, clock: Clock
) -> None:
    call = FakeCall(clock.after(-1.0))
    loop.watch(call)
    blocked = bell.next_blocked()
    assert blocked.seconds == 0.0
    blocked.wake()
    loop.close()
    assert (call.expired, call.done) == (1, False)


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("ends", ["done", "expired"])
def test_a_call_that_was_watched_is_kept_by_nothing_afterwards(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock, ends: str
) -> None:
    """Its tensors' blocks are wanted back."""
    gone = threading.Event()
    call = FakeCall(clock.after(0.0 if ends == "expired" else 1000.0))
    weakref.finalize(call, gone.set)
    loop.watch(call)
    blocked = bell.next_blocked()
    if ends == "done":
        source.answer(call)
    del call
    blocked.wake()
    assert gone.wait(STUCK_SECONDS), "the background thread, which waits for the next, has kept it"
    loop.close()


def test_closing_ends_the_background_thread_and_lets_go_of_what_waiting_looks_at(bell: HandRungBell, source: FakeSource) -> None:
    before = _background()
    gone = threading.Event()

    class Memory:
        """What a doorbell looks at."""

        def block(self, *args: object) -> bool:
            return bell.block(*args)  # type: ignore[arg-type]

    memory = Memory()
    weakref.finalize(memory, gone.set)
    loop = CompletionLoop(memory.block)
    loop.add(source)
    del memory
    call = FakeCall()
    loop.watch(call)
    blocked = bell.next_blocked()
    source.answer(call)
    blocked.wake()
    loop.close()
    assert _background() == before
    gc.collect()
    assert gone.is_set()


def test_closing_a_loop_that_watched_nothing_starts_no_thread_and_who_waits_afterwards_is_told_at_its_deadline(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock
) -> None:
    before = _background()
    loop.close()
    assert _background() == before
    assert loop.wait(FakeCall(), clock.after(-1.0)) is False
    assert bell.nobody_else
