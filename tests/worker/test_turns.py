"""Turns of the threads that run calls."""

from __future__ import annotations

import threading

from shmbroker.worker.shares import Key
from shmbroker.worker.turns import Turns
from tests.processes import wait_until


def key(start: float) -> Key:
    return start, 0.0, 0


def test_of_the_threads_that_wait_the_least_key_is_next() -> None:
    """W1, over the lanes of both threads."""
    turns, order, threads = Turns(), [], []
    turns.take(key(0))

    def run(start: float) -> None:
        turns.take(key(start))
        order.append(start)
        turns.give_back()

    for count, start in enumerate((3.0, 1.0, 2.0), 1):
        threads.append(threading.Thread(target=run, args=(start,)))
        threads[-1].start()
        wait_until(lambda: len(turns.waiting) == count)  # noqa: B023
    turns.give_back()
    for thread in threads:
        thread.join()
    assert order == [1.0, 2.0, 3.0]
    assert turns.free


def test_who_gives_its_turn_back_and_wants_another_lets_a_lesser_key_go_first() -> None:
    turns, order = Turns(), []
    turns.take(key(5))

    def run() -> None:
        turns.take(key(4))
        order.append("other")
        turns.give_back()

    other = threading.Thread(target=run)
    other.start()
    wait_until(lambda: bool(turns.waiting))
    turns.give_back()
    turns.take(key(5))
    order.append("self")
    turns.give_back()
    other.join()
    assert order == ["other", "self"]


def test_who_gives_its_turn_back_and_has_the_least_key_goes_on() -> None:
    turns, order = Turns(), []
    turns.take(key(1))

    def run() -> None:
        turns.take(key(4))
        order.append("other")
        turns.give_back()

    other = threading.Thread(target=run)
    other.start()
    wait_until(lambda: bool(turns.waiting))
    for _ in range(3):
        turns.give_back()
        turns.take(key(1))
        order.append("self")
    turns.give_back()
    other.join()
    assert order == ["self", "self", "self", "other"]


def test_never_two_at_once() -> None:
    turns, inside, most = Turns(), [], []

    def run(start: float) -> None:
        for _ in range(300):
            turns.take(key(start))
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            turns.give_back()

    threads = [threading.Thread(target=run, args=(float(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 1200
