"""Waiting for completions in any order that comes: by many threads that do everything at once, and step by step against a model."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from shmbroker.call import completions
from shmbroker.call.completions import CompletionLoop
from tests.call.fake_sources import CountingBell, FakeCall, FakeFuture, FakeSource
from tests.threads import STUCK_SECONDS, InThread

CALLS = 300
"""Of each thread."""


class Peer:
    """Answers calls in a thread of its own, in any order, as several workers would."""

    def __init__(self, bell: CountingBell, seed: int) -> None:
        self._bell = bell
        self._random = random.Random(seed)
        self._asked: list[tuple[FakeSource, FakeCall]] = []
        self._news = threading.Condition()
        self._ended = False
        self._thread = InThread(self._answer)

    def ask(self, source: FakeSource, call: FakeCall) -> None:
        """Have ``call`` answered on ``source`` at some time."""
        with self._news:
            self._asked.append((source, call))
            self._news.notify()

    def end(self) -> None:
        """Answer what is left, and no more."""
        with self._news:
            self._ended = True
            self._news.notify()
        self._thread.join()

    def _answer(self) -> None:
        while True:
            with self._news:
                while not self._asked:
                    if self._ended:
                        return
                    assert self._news.wait(STUCK_SECONDS)
                batch = self._random.sample(self._asked, self._random.randint(1, len(self._asked)))
                for one in batch:
                    self._asked.remove(one)
            for source, call in batch:
                source.answer(call)
                self._bell.ring()


def _call_and_wait(loop: CompletionLoop, sources: list[FakeSource], peer: Peer, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(CALLS):
        calls = [FakeCall() for _ in range(choose.choice((1, 1, 1, 4)))]
        for call in calls:
            peer.ask(choose.choice(sources), call)
        for call in choose.sample(calls, len(calls)):
            assert loop.wait(call, 0)
            assert call.done


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_wait_for_each_others_completions_lose_no_word(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """C1, C2: with a recheck bound that heals nothing in time."""
    monkeypatch.setattr(completions, "RECHECK_SECONDS", 600.0)
    bell = CountingBell()
    loop = CompletionLoop(bell.block)
    sources = [FakeSource(), FakeSource()]
    for source in sources:
        loop.add(source)
    peer = Peer(bell, seed)
    threads = [InThread(lambda number=number: _call_and_wait(loop, sources, peer, seed * 100 + number)) for number in range(6)]
    for thread in threads:
        thread.join()
    peer.end()
    assert not any(source.crowded for source in sources)


def _disturb(loop: CompletionLoop, go_on: Callable[[], bool], seed: int) -> None:
    """Whatever else is done with a loop, over and over."""
    choose = random.Random(seed)
    alone = threading.Lock()

    def visit() -> None:
        assert alone.acquire(blocking=False)
        alone.release()

    while go_on():
        what = choose.randrange(4)
        if what == 0:
            loop.alone(visit)
        elif what == 1:
            loop.check_peers()
        elif what == 2:
            loop.wait_any(0.001)
        else:
            passing = FakeSource()
            loop.add(passing)
            passing.answer(FakeCall())
            loop.remove(passing)
            passing.look = _must_not_be_read


def _must_not_be_read() -> None:
    raise AssertionError("a source was read after it was removed")


def _call_in_every_way(loop: CompletionLoop, source: FakeSource, peer: Peer, seed: int) -> None:
    """Calls that are waited for, watched, called back from, and given up."""
    choose = random.Random(seed)
    settled: list[FakeFuture] = []
    left = threading.Semaphore(0)
    expected = 0

    def call_again() -> None:
        inner = FakeCall()
        peer.ask(source, inner)
        assert loop.wait(inner, 0)
        left.release()

    for _ in range(CALLS):
        how = choose.randrange(4)
        if how == 0:
            call = FakeCall()
            peer.ask(source, call)
            assert loop.wait(call, 0)
        elif how == 1:
            assert loop.wait(FakeCall(), 1) is False, "its deadline was in the first nanosecond, and nobody answers it"
        else:
            future = FakeFuture(call_again if how == 2 else left.release)
            call = FakeCall(on_finish=lambda future=future: loop.settle_later(future))
            settled.append(future)
            expected += 1
            if choose.random() < 0.5:
                loop.watch(call)
                peer.ask(source, call)
            else:
                peer.ask(source, call)
                assert loop.wait(call, 0)
    for _ in range(expected):
        assert left.acquire(timeout=STUCK_SECONDS)
    assert [future.settled for future in settled] == [1] * expected


@pytest.mark.parametrize("seed", range(3))
def test_whatever_threads_do_with_a_loop_at_once_each_call_is_finished_once_and_nobody_reads_with_another(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """C1 to C5."""
    monkeypatch.setattr(completions, "RECHECK_SECONDS", 0.002)
    bell = CountingBell()
    loop = CompletionLoop(bell.block)
    source = FakeSource()
    loop.add(source)
    peer = Peer(bell, seed)
    ended = threading.Event()
    disturbers = [InThread(lambda number=number: _disturb(loop, lambda: not ended.is_set(), seed * 100 + number)) for number in range(2)]
    callers = [InThread(lambda number=number: _call_in_every_way(loop, source, peer, seed * 100 + 50 + number)) for number in range(4)]
    try:
        for caller in callers:
            caller.join()
    finally:
        ended.set()
    for disturber in disturbers:
        disturber.join()
    peer.end()
    loop.close()
    assert not source.crowded


# --- step by step, against a model -----------------------------------------------------------------------------------------------------


class LoopAgainstModel(RuleBasedStateMachine):
    """One thread, a doorbell that blocks for no time: what is read, whose lives are looked at, what is settled."""

    sources: Bundle[FakeSource] = Bundle("sources")
    calls: Bundle[FakeCall] = Bundle("calls")

    @initialize(target=sources)
    def begin(self) -> FakeSource:
        self.loop = CompletionLoop(lambda ready, receivers, seconds: ready())
        self.added: list[FakeSource] = []
        self.answered: dict[FakeSource, list[FakeCall]] = {}
        """By source, what is there and was not read."""
        self.done: set[FakeCall] = set()
        self.checked: dict[FakeSource, int] = {}
        self.settled: list[FakeCall] = []
        self.to_be_settled: set[FakeCall] = set()
        return self.add()

    @rule(target=sources)
    def add(self) -> FakeSource:
        source = FakeSource()
        self.loop.add(source)
        self.added.append(source)
        self.answered[source] = []
        self.checked[source] = 0
        return source

    @rule(source=sources)
    def remove(self, source: FakeSource) -> None:
        self.loop.remove(source)
        if source in self.added:
            self.added.remove(source)

    @rule(source=sources)
    def add_again(self, source: FakeSource) -> None:
        if source not in self.added:
            self.loop.add(source)
            self.added.append(source)

    @rule(target=calls, attached=st.booleans())
    def submit(self, attached: bool) -> FakeCall:
        call = FakeCall()
        if attached:
            self.to_be_settled.add(call)
            call.on_finish = lambda: self.loop.settle_later(FakeFuture(lambda: self.settled.append(call)))
        return call

    @rule(source=sources, call=consumes(calls), keep=st.booleans(), target=calls)
    def answer(self, source: FakeSource, call: FakeCall, keep: bool) -> object:
        if call in self.done or any(call in there for there in self.answered.values()):
            return multiple(*([call] if keep else []))
        source.answer(call)
        self.answered[source].append(call)
        return call

    @rule(call=calls)
    def wait_until_a_deadline_that_has_passed(self, call: FakeCall) -> None:
        known = call in self.done
        if not known:
            self.model_reads()  # a last look; the peers' lives are looked at after real waits only
        assert self.loop.wait(call, 1) == (call in self.done)

    @rule(call=calls)
    def wait_for_ever_for_what_is_there(self, call: FakeCall) -> None:
        if call in self.done or any(call in self.answered[source] for source in self.added):
            if call not in self.done:
                self.model_reads()
            assert self.loop.wait(call, 0)

    @rule()
    def wait_for_any(self) -> None:
        if not self.model_reads():
            self.model_checks()
        self.loop.wait_any(1.0)

    @rule()
    def check_peers(self) -> None:
        self.model_checks()
        self.loop.check_peers()

    @rule(call=calls)
    def finish_alone(self, call: FakeCall) -> None:
        """As when a channel is closed: its calls are failed."""
        if call not in self.done and not any(call in there for there in self.answered.values()):
            self.loop.alone(call.finish)
            self.done.add(call)

    def model_reads(self) -> bool:
        """Who reads reads all; whether anything was there."""
        found = [call for source in self.added for call in self.answered[source]]
        for source in self.added:
            self.answered[source].clear()
        self.done.update(found)
        return bool(found)

    def model_checks(self) -> None:
        for source in self.added:
            self.checked[source] += 1

    @invariant()
    def as_the_model_has_it(self) -> None:
        if not hasattr(self, "loop"):
            return
        for source in self.answered:
            assert source.checked == self.checked[source]
            assert source.has_frames() == bool(self.answered[source])
            assert all(not call.done for call in self.answered[source])
        assert all(call.done for call in self.done)
        assert len(self.settled) == len(set(self.settled))
        assert set(self.settled) == self.to_be_settled & self.done, "settled at once, once each"


TestLoopAgainstModel = LoopAgainstModel.TestCase
TestLoopAgainstModel.settings = settings(deadline=None, max_examples=120, stateful_step_count=40)
