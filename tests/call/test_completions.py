"""Waiting for completions, by one thread and by many, with sources and doorbells in the test's hand. Invariants C1 to C4.

Where a word from one thread must reach another, ``RECHECK_SECONDS`` is raised above the test's own deadline: a lost word then ends the test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shmbroker.call import completions
from shmbroker.call.completions import CompletionLoop
from shmbroker.call.state import DONE
from shmbroker.lane.doorbell import RECHECK_SECONDS
from tests.call.fake_sources import (
    Blocked,
    Clock,
    FakeCall,
    FakeSource,
    HandRungBell,
    Trouble,
    WatchedLocks,
    do_nothing,
    followers,
    raise_trouble,
    waiting,
)
from tests.threads import STUCK_SECONDS, InThread

# --- one thread reads for all (C1) -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_recheck")
def test_one_thread_takes_the_completions_of_all_that_wait_and_they_have_its_word(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    """C1."""
    own, others = FakeCall(), [FakeCall() for _ in range(6)]
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    assert blocked.thread == leader.ident
    threads = followers(loop, others)
    assert bell.nobody_else, "one thread blocks on the doorbell, the others wait for a word from it"
    source.answer(*others)
    blocked.wake()
    assert all(thread.join() for thread in threads), "done, though the leader still waits"
    blocked = bell.next_blocked()
    source.answer(own)
    blocked.wake()
    assert leader.join()
    assert source.readers == [leader.ident] * 2
    assert bell.nobody_else


@pytest.mark.usefixtures("no_recheck")
def test_a_call_that_is_finished_before_the_leader_could_see_its_follower_is_done(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    """C1: the word that the leader had for nobody is not waited for."""
    own = FakeCall()
    leader = waiting(loop, own)
    first = bell.next_blocked()

    def finish_it() -> None:
        source.answer(other)
        first.wake()
        again.append(bell.next_blocked())

    again: list[Blocked] = []
    other = FakeCall(on_follow=finish_it)
    assert waiting(loop, other).join()
    source.answer(own)
    again[0].wake()
    assert leader.join()


@pytest.mark.usefixtures("no_recheck")
def test_who_begins_to_follow_when_the_leader_leaves_takes_the_lead(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C2: the leader had nobody to hand it to."""
    own = FakeCall()
    leader = waiting(loop, own)
    first = bell.next_blocked()

    def let_it_leave() -> None:
        source.answer(own)
        first.wake()
        assert leader.join()

    other = FakeCall(on_follow=let_it_leave)
    follower = waiting(loop, other)
    blocked = bell.next_blocked()
    assert blocked.thread == follower.ident
    source.answer(other)
    blocked.wake()
    assert follower.join()


def test_who_waits_for_what_is_done_already_reads_nothing(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    done, other = FakeCall(), FakeCall()
    done.finish()
    source.answer(other)
    assert loop.wait(done, 0)
    assert (source.readers, other.done, bell.nobody_else) == ([], False, True)


def test_a_leader_looks_at_the_receivers_before_it_blocks(monkeypatch: pytest.MonkeyPatch, bell: HandRungBell, source: FakeSource) -> None:
    """Most calls are answered by then: they cost no sleep."""
    looks: list[tuple[object, float]] = []
    call, other = FakeCall(), FakeCall()

    def spin(receivers: object, seconds: float) -> bool:
        looks.append((receivers, seconds))
        source.answer(call)
        return True

    monkeypatch.setattr(completions, "spin", spin)
    source.receivers = (object(),)  # type: ignore[assignment]
    loop = CompletionLoop(bell.block, 0.25)
    loop.add(source)
    assert loop.wait(call, 0)
    assert looks == [(source.receivers, 0.25)]
    assert bell.nobody_else
    monkeypatch.setattr(completions, "spin", lambda receivers, seconds: False)
    leader = waiting(loop, other)
    blocked = bell.next_blocked()
    source.answer(other)
    blocked.wake()
    assert leader.join()


def test_a_leader_reads_all_sources_whichever_was_ready(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    sources = [source, FakeSource(), FakeSource()]
    for other in sources[1:]:
        loop.add(other)
    calls = [FakeCall() for _ in sources]
    leader = waiting(loop, calls[2])
    blocked = bell.next_blocked()
    for one, call in zip(sources, calls, strict=True):
        one.answer(call)
    blocked.wake()
    assert leader.join()
    assert [call.done for call in calls] == [True] * 3


def test_a_source_that_is_added_meanwhile_is_the_leaders_to_read(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C1, C3: after at most one wait more, for whoever waits on either."""
    own, others = FakeCall(), FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    added = FakeSource()
    loop.add(added)
    (follower,) = followers(loop, [others])
    added.answer(others)
    blocked.wake()  # it was blocked before, and looks at what it knew of
    bell.next_blocked().wake()
    assert follower.join()
    blocked = bell.next_blocked()
    source.answer(own)
    blocked.wake()
    assert leader.join()
    assert set(added.readers) == {leader.ident}


def test_sources_may_be_added_by_many_threads_at_once(loop: CompletionLoop, source: FakeSource) -> None:
    sources = [FakeSource() for _ in range(32)]
    start = threading.Barrier(8)

    def add(own: list[FakeSource]) -> None:
        start.wait(STUCK_SECONDS)
        for one in own:
            loop.add(one)

    for thread in [InThread(lambda own=sources[i::8]: add(own)) for i in range(8)]:
        thread.join()
    loop.check_peers()
    assert [one.checked for one in (source, *sources)] == [1] * 33


# --- the lead is handed on (C2) --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_recheck")
def test_a_leader_whose_own_call_is_done_hands_the_lead_to_one_that_still_waits(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    """C2, over and over, until nobody waits; no lead goes to one whose call is done as well."""
    calls = [FakeCall() for _ in range(8)]
    leader = waiting(loop, calls[0])
    blocked = bell.next_blocked()
    threads = [leader, *followers(loop, calls[1:])]
    left = dict(zip([thread.ident for thread in threads], zip(calls, threads, strict=True), strict=True))
    while left:
        call, thread = left.pop(blocked.thread)
        answered = [call]
        if left:  # one of the followers with it
            other = next(iter(left))
            answered.append(left[other][0])
        source.answer(*answered)
        blocked.wake()
        assert thread.join()
        if len(answered) > 1:
            assert left.pop(other)[1].join()
        if left:
            blocked = bell.next_blocked()
            assert blocked.thread in left
    assert bell.nobody_else


@pytest.mark.usefixtures("no_recheck")
def test_a_leader_whose_deadline_has_passed_hands_the_lead_on_too(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock
) -> None:
    """C2."""
    own, other = FakeCall(), FakeCall()
    leader = waiting(loop, own, clock.after(1.0))
    blocked = bell.next_blocked()
    (follower,) = followers(loop, [other])
    clock.advance(1.0)
    blocked.wake()
    blocked = bell.next_blocked()
    assert (blocked.thread, blocked.seconds) == (leader.ident, 0.0), "a last look"
    blocked.wake()
    assert leader.join() is False
    blocked = bell.next_blocked()
    assert blocked.thread == follower.ident
    source.answer(other)
    blocked.wake()
    assert follower.join()


@pytest.mark.usefixtures("no_recheck")
@pytest.mark.parametrize("where", ["drain", "check_peer", "block"])
def test_an_error_of_a_leader_leaves_the_lead_to_the_next(loop: CompletionLoop, bell: HandRungBell, source: FakeSource, where: str) -> None:
    """C2: whatever a source raises, or a signal's handler while it is blocked."""
    own, other = FakeCall(), FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    (follower,) = followers(loop, [other])
    if where != "block":
        source.look = raise_trouble
    if where == "drain":
        source.answer(FakeCall())
    blocked.wake(Trouble() if where == "block" else None)
    with pytest.raises(Trouble):
        leader.join()
    source.look = do_nothing
    blocked = bell.next_blocked()
    assert blocked.thread == follower.ident
    source.answer(other)
    blocked.wake()
    assert follower.join()


@pytest.mark.parametrize("how", ["wait", "wait_any", "wait_any in vain", "alone", "check_peers"])
def test_an_error_leaves_nobody_in_the_lead(source: FakeSource, how: str) -> None:
    loop = CompletionLoop(lambda ready, receivers, seconds: ready())
    loop.add(source)
    source.look = raise_trouble
    if "vain" not in how:
        source.answer(FakeCall())
    uses: dict[str, Callable[[], object]] = {
        "wait": lambda: loop.wait(FakeCall(), 1),
        "wait_any": lambda: loop.wait_any(1.0),
        "wait_any in vain": lambda: loop.wait_any(1.0),
        "alone": lambda: loop.alone(raise_trouble),
        "check_peers": loop.check_peers,
    }
    with pytest.raises(Trouble):
        uses[how]()
    source.look = do_nothing
    call = FakeCall()
    source.answer(call)
    assert InThread(lambda: loop.wait(call, 0)).join()
    InThread(lambda: loop.alone(do_nothing)).join()


# --- nobody waits for long at once (C3) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadline", "waits"),
    [
        (None, [RECHECK_SECONDS] * 5),
        (0.25, [RECHECK_SECONDS, RECHECK_SECONDS, 0.05, 0.0]),
        (RECHECK_SECONDS, [RECHECK_SECONDS, 0.0]),
        (0.001, [0.001, 0.0]),
        (0.0, [0.0]),
        (-1.0, [0.0]),
    ],
)
def test_a_leader_blocks_no_longer_than_the_bound_and_looks_at_peers_and_deadline_after_each_wait(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock, deadline: float | None, waits: list[float]
) -> None:
    """C3."""
    call = FakeCall()
    leader = waiting(loop, call, 0 if deadline is None else clock.after(deadline))
    for number, seconds in enumerate(waits):
        blocked = bell.next_blocked()
        assert blocked.seconds == pytest.approx(seconds)
        assert source.checked == number, "once after each wait that nothing came of"
        clock.advance(seconds)
        if deadline is None and number == len(waits) - 1:
            source.answer(call)
        blocked.wake()
    assert leader.join() is (deadline is None)
    assert source.checked == len(waits) - 1, "not after a mere look, nor after something came"
    assert bell.nobody_else


def test_a_leader_whose_call_is_failed_with_its_peer_is_done(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C3: the peer is found dead after one wait."""
    call = FakeCall()
    leader = waiting(loop, call)
    blocked = bell.next_blocked()
    source.look = call.finish
    blocked.wake()
    assert leader.join()
    assert (source.checked, source.readers) == (1, [])


def test_a_deadline_that_passes_is_told_though_others_completions_keep_coming(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock
) -> None:
    """C3."""
    leader = waiting(loop, FakeCall(), clock.after(0.25))
    for _ in range(5):
        blocked = bell.next_blocked()
        clock.advance(0.06)
        source.answer(FakeCall())
        blocked.wake()
    blocked = bell.next_blocked()
    assert blocked.seconds == 0.0
    source.answer(FakeCall())
    blocked.wake()
    assert leader.join() is False


@pytest.mark.parametrize(("deadline", "waits"), [(0.25, [RECHECK_SECONDS, RECHECK_SECONDS, 0.05]), (0.0, []), (-1.0, [])])
def test_a_follower_waits_no_longer_than_the_bound_for_a_word_and_looks_at_its_deadline_after_each_wait(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock, locks: WatchedLocks, deadline: float, waits: list[float]
) -> None:
    """C3: also behind a leader that says nothing and does nothing at all."""
    locks.clock = clock
    own, other = FakeCall(), FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    assert waiting(loop, other, clock.after(deadline)).join() is False
    assert locks.waits == pytest.approx(waits)
    assert leader.running
    source.answer(own)
    blocked.wake()
    assert leader.join()


def test_a_follower_that_is_never_told_finds_that_its_call_is_done(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C3: a word that is lost costs one wait, no more."""
    own, other = FakeCall(), FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    (follower,) = followers(loop, [other])
    other.state = DONE
    assert follower.join()
    source.answer(own)
    blocked.wake()
    assert leader.join()


@pytest.mark.parametrize(("asked", "seconds"), [(0.0, 0.0), (0.01, 0.01), (RECHECK_SECONDS, RECHECK_SECONDS), (1e9, RECHECK_SECONDS)])
def test_waiting_for_any_completion_blocks_once_and_no_longer_than_the_bound(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, asked: float, seconds: float
) -> None:
    """C3: for who needs a free slot; then it takes what there is, or looks at the peers' lives."""
    for comes in (False, True):
        thread = InThread(lambda: loop.wait_any(asked))
        blocked = bell.next_blocked()
        assert blocked.seconds == seconds
        if comes:
            source.answer(FakeCall())
        blocked.wake()
        thread.join()
        assert (source.checked, len(source.readers)) == (1, int(comes))
    assert bell.nobody_else


@pytest.mark.parametrize(("asked", "seconds"), [(0.01, 0.01), (1e9, RECHECK_SECONDS)])
def test_waiting_for_any_completion_behind_a_leader_ends_at_the_bound_too(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource, clock: Clock, locks: WatchedLocks, asked: float, seconds: float
) -> None:
    """C1, C3: it reads nothing that another thread may be reading."""
    locks.clock = clock
    loop = CompletionLoop(bell.block)
    loop.add(source)
    own = FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    loop.wait_any(asked)
    assert locks.waits == [seconds]
    assert (source.readers, source.checked, bell.nobody_else) == ([], 0, True)
    source.answer(own)
    blocked.wake()
    assert leader.join()


def test_looking_at_the_peers_lives_now_is_left_to_the_leader_where_there_is_one(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    """C1, C3."""
    loop.check_peers()
    assert source.checked == 1
    own = FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    loop.check_peers()
    assert source.checked == 1
    blocked.wake()
    blocked = bell.next_blocked()
    assert source.checked == 2
    source.answer(own)
    blocked.wake()
    assert leader.join()


# --- who must read alone (C4) ----------------------------------------------------------------------------------------------------------


class Alone:
    """What several threads do alone: notes how many at once, and stays at it until it is told to go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.done = 0
        self._inside = threading.Lock()

    def __call__(self) -> None:
        assert self._inside.acquire(blocking=False), "two threads are alone at once"
        self.entered.release()
        assert self.go_on.acquire(timeout=STUCK_SECONDS)
        self.done += 1
        self._inside.release()


@pytest.mark.usefixtures("no_recheck")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_leader_makes_way_after_one_wait_for_all_that_must_read_alone(
    bell: HandRungBell, source: FakeSource, locks: WatchedLocks, count: int
) -> None:
    """C4: for several such threads too, one after the other; who waits for calls waits on meanwhile, also who comes then."""
    loop = CompletionLoop(bell.block)
    loop.add(source)
    own, others = FakeCall(), [FakeCall(), FakeCall()]
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    threads = followers(loop, others[:1])
    alone = Alone()
    visitors = []
    for _ in range(count):
        visitors.append(InThread(lambda: loop.alone(alone)))
        assert locks.next_waiting() == visitors[-1].ident
    assert not alone.entered.acquire(blocking=False), "somebody else reads"
    blocked.wake()  # the one wait
    for number in range(count):
        assert alone.entered.acquire(timeout=STUCK_SECONDS)
        if not number:
            threads += followers(loop, others[1:])
        assert bell.nobody_else, "nobody blocks, and so nobody reads, while one is alone"
        alone.go_on.release()
    for visitor in visitors:
        visitor.join()
    assert alone.done == count
    blocked = bell.next_blocked()
    assert blocked.thread in {thread.ident for thread in (leader, *threads)}
    source.answer(own, *others)
    blocked.wake()
    assert all([thread.join() for thread in (leader, *threads)])


@pytest.mark.usefixtures("no_recheck")
def test_who_must_read_alone_need_not_wait_where_nobody_reads_and_may_not_be_overtaken(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    """C4: who comes to wait for a call meanwhile reads only afterwards."""
    call, alone = FakeCall(), Alone()
    visitor = InThread(lambda: loop.alone(alone))
    assert alone.entered.acquire(timeout=STUCK_SECONDS)
    (thread,) = followers(loop, [call])
    assert bell.nobody_else
    alone.go_on.release()
    visitor.join()
    blocked = bell.next_blocked()
    assert blocked.thread == thread.ident
    source.answer(call)
    blocked.wake()
    assert thread.join()


def test_a_source_is_removed_when_nobody_reads_from_it_any_more(bell: HandRungBell, source: FakeSource, locks: WatchedLocks) -> None:
    """C4: so its memory may be given up when that returns."""
    loop = CompletionLoop(bell.block)
    loop.add(source)
    other = FakeSource()
    loop.add(other)
    reading, go_on = threading.Event(), threading.Event()

    def look() -> None:
        reading.set()
        assert go_on.wait(STUCK_SECONDS)

    source.look = look
    call = FakeCall()
    leader = waiting(loop, call)
    blocked = bell.next_blocked()
    source.answer(FakeCall())
    blocked.wake()
    assert reading.wait(STUCK_SECONDS)
    removing = InThread(lambda: loop.remove(source))
    assert locks.next_waiting() == removing.ident
    assert removing.running
    go_on.set()
    removing.join()
    source.look = raise_trouble
    source.answer(FakeCall())
    other.answer(call)
    bell.next_blocked().wake()
    assert leader.join()
    loop.check_peers()
    assert (len(source.readers), source.checked) == (1, 0)
    loop.remove(source)  # a second time does nothing
    assert other.checked == 1
