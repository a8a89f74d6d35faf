"""A signal that comes while a run gives back what it made waits until that is done."""

from __future__ import annotations

import signal
import threading

import pytest

from tee_worker.held_signals import HeldSignals


class Ended(Exception):
    pass


reached: list[int] = []
"""What came to the end of its block."""


@pytest.fixture(autouse=True, params=[signal.SIGTERM, signal.SIGINT])
def number(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """A signal whose handler raises, as those of the programs do."""

    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(request.param, end)
    yield request.param
    signal.signal(request.param, before)


def ended_by(number: signal.Signals, *, held: bool, error: Exception | None = None) -> None:
    """A block in which the signal comes, held or not, and which may then end by an error."""
    with HeldSignals() as signals:
        if held:
            signals.hold()
        signal.raise_signal(number)
        reached.append(number)
        if error is not None:
            raise error


def test_a_signal_waits_from_hold_to_the_end_of_the_block(number: signal.Signals) -> None:
    reached.clear()
    with pytest.raises(Ended):
        ended_by(number, held=True)
    assert reached == [number]
    with pytest.raises(Ended):
        signal.raise_signal(number)  # the handler is there again


def test_a_signal_before_that_ends_at_once(number: signal.Signals) -> None:
    reached.clear()
    with pytest.raises(Ended):
        ended_by(number, held=False)
    assert reached == []


def test_an_error_of_the_block_is_not_covered_by_a_signal(number: signal.Signals) -> None:
    with pytest.raises(ValueError, match="its own"):
        ended_by(number, held=True, error=ValueError("its own"))


def test_in_another_thread_nothing_is_held(number: signal.Signals) -> None:
    def run() -> None:
        with HeldSignals() as signals:
            signals.hold()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with pytest.raises(Ended):
        signal.raise_signal(number)


def replaced_and_taken_back(number: signal.Signals) -> None:
    with HeldSignals() as signals:
        signal.signal(number, signal.SIG_IGN)
        signal.raise_signal(number)
        signals.take_back()
        reached.append(number)
        signal.raise_signal(number)


def test_handlers_that_a_library_has_replaced_are_taken_back(number: signal.Signals) -> None:
    reached.clear()
    with pytest.raises(Ended):
        replaced_and_taken_back(number)
    assert reached == [number]
