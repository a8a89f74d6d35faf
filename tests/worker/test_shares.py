"""How a worker's time is shared, by the numbered rules of its docstring."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import shmbroker
from gpu_worker.cli import cli as gpu_worker
from shmbroker.worker.shares import MOST_AHEAD_NS, Share, Shares

MS = 1e6


@dataclass
class Wanting:
    """A client that always wants another turn, of the same length, and what it has had."""

    share: Share
    turn_ns: float
    had_ns: float = 0.0
    turns: int = 0


def next_of(shares: Shares, waiting: list[Wanting]) -> Wanting:
    return min(waiting, key=lambda one: shares.key(one.share))


def run_turn(shares: Shares, one: Wanting) -> None:
    shares.begin(one.share)
    shares.charge(one.share, one.turn_ns)
    one.had_ns += one.turn_ns
    one.turns += 1


turn_lengths = st.floats(1 * MS, 20 * MS)
weights = st.sampled_from([0.5, 1.0, 3.0])
clients_of = st.lists(st.tuples(weights, turn_lengths), min_size=2, max_size=4)


def made(told: list[tuple[float, float]]) -> tuple[Shares, list[Wanting]]:
    shares = Shares({f"client {number}": weight for number, (weight, _) in enumerate(told)})
    return shares, [Wanting(shares.open(str(number), f"client {number}"), turn_ns) for number, (_, turn_ns) in enumerate(told)]


@settings(deadline=None, max_examples=40)
@given(clients_of)
def test_clients_that_always_want_more_have_time_by_their_weights(told: list[tuple[float, float]]) -> None:
    """W1: at any time, within one turn of each."""
    shares, clients = made(told)
    for _ in range(100):
        run_turn(shares, next_of(shares, clients))
        for one in clients:
            for other in clients:
                ahead = one.had_ns / one.share.weight - other.had_ns / other.share.weight
                assert ahead <= one.turn_ns / one.share.weight + 1e-3


@settings(deadline=None, max_examples=40)
@given(clients_of, st.data())
def test_none_waits_longer_than_its_own_last_turn_and_one_turn_of_each_other(told: list[tuple[float, float]], data: st.DataObject) -> None:
    """W2, also where others come and go."""
    shares, clients = made(told)
    waiting, *others = clients
    for _ in range(4):
        while next_of(shares, clients) is not waiting:
            run_turn(shares, next_of(shares, clients))
        run_turn(shares, waiting)
        before = {id(one): one.had_ns for one in others}
        wanting = [one for one in others if data.draw(st.booleans())]
        while (one := next_of(shares, [waiting, *wanting])) is not waiting:
            run_turn(shares, one)
        for one in others:
            had = (one.had_ns - before[id(one)]) / one.share.weight
            assert had <= waiting.turn_ns / waiting.share.weight + one.turn_ns / one.share.weight + 1e-3


@settings(deadline=None, max_examples=40)
@given(clients_of, st.integers(1, 50))
def test_who_wanted_nothing_has_saved_up_nothing(told: list[tuple[float, float]], turns: int) -> None:
    """W3: after it comes back, it is one turn ahead at most."""
    shares, (idle, *busy) = made(told)
    for _ in range(turns):
        run_turn(shares, next_of(shares, busy))
    before = [one.had_ns for one in busy]
    for _ in range(50):
        run_turn(shares, next_of(shares, [idle, *busy]))
        for one, had in zip(busy, before, strict=True):
            behind = idle.had_ns / idle.share.weight - (one.had_ns - had) / one.share.weight
            assert behind <= max(other.turn_ns / other.share.weight for other in busy) + idle.turn_ns / idle.share.weight + 1e-3


@settings(deadline=None, max_examples=40)
@given(turn_lengths, turn_lengths)
def test_time_that_nobody_else_wanted_is_owed_to_nobody(first_ns: float, second_ns: float) -> None:
    """W4: one client ran alone; when both want something, they are equal."""
    shares, (one, other) = made([(1.0, first_ns), (1.0, second_ns)])
    for _ in range(5):
        run_turn(shares, one)
        shares.rest()
    assert shares.key(one.share)[0] == shares.key(other.share)[0]


def test_a_client_that_comes_while_a_long_turn_runs_is_next() -> None:
    """W1: and after each of its short turns again."""
    shares, (long, short) = made([(1.0, 5 * MS), (1.0, 0.3 * MS)])
    for _ in range(3):
        run_turn(shares, long)
    for _ in range(5):
        assert next_of(shares, [long, short]) is short
        run_turn(shares, short)
        run_turn(shares, long)  # the only one that waits, until the other's next call has come


def test_one_call_of_minutes_is_not_held_against_its_client_for_minutes() -> None:
    """W2: what it had beyond a bound is forgiven."""
    shares, (long, short) = made([(1.0, 600e9), (1.0, 5 * MS)])
    run_turn(shares, long)
    turns = 0
    while next_of(shares, [long, short]) is short:
        run_turn(shares, short)
        turns += 1
    assert turns <= MOST_AHEAD_NS / (5 * MS) + 1


def test_there_is_something_to_share_while_more_than_one_client_has_a_channel() -> None:
    shares = Shares()
    first, again = shares.open("a", "name"), shares.open("a", "name")
    assert first is again
    assert not shares.several
    other = shares.open("b", "name")
    assert shares.several
    shares.close(first)
    assert shares.several
    shares.close(again)
    assert not shares.several
    shares.close(other)


@pytest.mark.parametrize(("name", "weight"), [("chat", 3.0), ("other", 1.0)])
def test_a_client_has_the_weight_of_its_name(name: str, weight: float) -> None:
    assert Shares({"chat": 3.0}).open("a", name).weight == weight


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2"])
def test_a_weight_that_is_no_number_above_0_is_told(weight: object) -> None:
    with pytest.raises(shmbroker.BadInput, match="of client 'chat' cannot be used: give a number above 0"):
        shmbroker.Worker("any", client_weights={"chat": weight})  # type: ignore[dict-item]


@pytest.mark.parametrize("told", ["chat", "chat=", "=2", "chat=0", "chat=-1", "chat=much"])
def test_the_option_for_weights_takes_a_name_and_a_number(told: str) -> None:
    outcome = CliRunner().invoke(gpu_worker, ["serve", "--weight", told])
    assert outcome.exit_code == 2
    assert "give a client's name and a number above 0, e.g. chat=2" in " ".join(outcome.output.split())


def test_who_takes_part_in_the_turn_of_another_stays_as_far_ahead() -> None:
    """W1: one client's long calls are not forgiven because a short one of it ran with another's."""
    shares = Shares()
    first, other = shares.open("first", ""), shares.open("other", "")
    shares.begin(first)
    shares.charge(first, 1e9)
    for _ in range(5):
        shares.begin(other)
        shares.join(first)
        shares.charge(first, 1e3)
        shares.charge(other, 1e3)
    assert shares.is_ahead(first)
    assert not shares.is_ahead(other)
