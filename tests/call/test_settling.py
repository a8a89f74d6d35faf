"""What is done with completions: futures that are settled, their callbacks, and looking without waiting. Invariant C5."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shmbroker.call.completions import CompletionLoop
from tests.call.fake_sources import FakeCall, FakeFuture, FakeSource, HandRungBell, Trouble, do_nothing, followers, raise_trouble, waiting
from tests.threads import STUCK_SECONDS, InThread


def _attached(loop: CompletionLoop, callback: Callable[[], object]) -> tuple[FakeCall, FakeFuture]:
    """A call with a future."""
    future = FakeFuture(callback)
    return FakeCall(on_finish=lambda: loop.settle_later(future)), future


@pytest.mark.usefixtures("no_recheck")
def test_a_futures_callback_may_call_and_wait_and_close(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C5: the thread that took the completion has given up the lead, so it can have it anew, and be alone."""
    inner = FakeCall()

    def callback() -> None:
        assert loop.wait(inner, 0)
        loop.alone(lambda: order.append("alone"))
        order.append("called back")

    order: list[str] = []
    call, future = _attached(loop, callback)
    leader = waiting(loop, call)
    blocked = bell.next_blocked()
    source.answer(call)
    blocked.wake()
    blocked = bell.next_blocked()
    assert blocked.thread == leader.ident
    source.answer(inner)
    blocked.wake()
    assert leader.join()
    assert (order, future.settled) == (["alone", "called back"], 1)


@pytest.mark.usefixtures("no_recheck")
def test_while_a_callback_runs_others_completions_are_taken(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C2, C5: the lead was handed on before it began."""
    called, go_on = threading.Event(), threading.Event()

    def callback() -> None:
        called.set()
        assert go_on.wait(STUCK_SECONDS)

    call, _ = _attached(loop, callback)
    other = FakeCall()
    leader = waiting(loop, call)
    blocked = bell.next_blocked()
    (follower,) = followers(loop, [other])
    source.answer(call)
    blocked.wake()
    assert called.wait(STUCK_SECONDS)
    blocked = bell.next_blocked()
    assert blocked.thread == follower.ident
    source.answer(other)
    blocked.wake()
    assert follower.join()
    assert leader.running
    go_on.set()
    assert leader.join()


@pytest.mark.parametrize("how", ["wait", "wait_any", "alone", "check_peers"])
def test_futures_are_settled_whenever_the_lead_is_given_up_once_each_and_in_order(source: FakeSource, how: str) -> None:
    """C5: by whoever has finished their calls, whatever it was after."""
    loop = CompletionLoop(lambda ready, receivers, seconds: ready())
    loop.add(source)
    order: list[int] = []

    def callback(number: int) -> None:
        order.append(number)
        before = source.checked
        loop.check_peers()
        assert source.checked > before, "the lead is still taken"

    attached = [_attached(loop, lambda number=number: callback(number)) for number in range(4)]
    calls = [call for call, _ in attached]

    def finish() -> None:
        source.look = do_nothing
        for call in calls:
            call.finish()
        assert order == [], "not in the midst of reading"

    source.look = finish
    last = FakeCall()
    if how in ("wait", "wait_any"):
        source.answer(last)
    uses: dict[str, Callable[[], object]] = {
        "wait": lambda: loop.wait(last, 0),
        "wait_any": lambda: loop.wait_any(1.0),
        "alone": lambda: loop.alone(finish),
        "check_peers": loop.check_peers,
    }
    InThread(uses[how]).join()
    assert order == [0, 1, 2, 3]
    assert [future.settled for _, future in attached] == [1] * 4


# --- a look, which waits for nothing ----------------------------------------------------------------------------------------------------


def test_who_looks_takes_what_there_is_and_settles_it_and_never_blocks(
    loop: CompletionLoop, bell: HandRungBell, source: FakeSource
) -> None:
    loop.look()
    assert (source.readers, source.checked) == ([], 1), "nothing there: the peer may be dead"
    call = FakeCall(on_finish=lambda: loop.settle_later(future))
    future = FakeFuture(lambda: None)
    source.answer(call)
    loop.look()
    assert (call.done, future.settled, bell.nobody_else) == (True, 1, True)


def test_who_looks_leaves_it_to_the_leader_where_there_is_one(loop: CompletionLoop, bell: HandRungBell, source: FakeSource) -> None:
    """C1."""
    own = FakeCall()
    leader = waiting(loop, own)
    blocked = bell.next_blocked()
    source.answer(own)
    loop.look()
    assert source.readers == []
    blocked.wake()
    assert leader.join()
    assert source.readers == [leader.ident]


def test_an_error_amid_a_look_leaves_nobody_in_the_lead(loop: CompletionLoop, source: FakeSource) -> None:
    source.look = raise_trouble
    with pytest.raises(Trouble):
        loop.look()
    source.look = do_nothing
    InThread(lambda: loop.alone(do_nothing)).join()


def test_callbacks_of_what_became_done_alone_are_run_in_the_background_where_that_is_asked_for(
    loop: CompletionLoop, source: FakeSource
) -> None:
    """C5: the thread that keeps a client known to its broker has no time for them."""
    threads: list[int] = []
    settled = threading.Event()
    future = FakeFuture(lambda: (threads.append(threading.get_ident()), settled.set()))
    loop.alone(lambda: loop.settle_later(future), settle_here=False)
    assert settled.wait(STUCK_SECONDS)
    assert threads != [threading.get_ident()]
    loop.close()
    loop.close()


def test_a_callback_may_close_the_loop_in_the_background(loop: CompletionLoop, source: FakeSource) -> None:
    """C5."""
    closed = threading.Event()
    future = FakeFuture(lambda: (loop.close(), closed.set()))
    loop.alone(lambda: loop.settle_later(future), settle_here=False)
    assert closed.wait(STUCK_SECONDS)
