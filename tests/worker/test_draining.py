"""Signals to a worker: it is asked to stop, and what was set for the signals before is set again afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from shmbroker.worker import draining
from shmbroker.worker.draining import Stop, drained_by_signals
from tests.conftest import InChild, StartChild
from tests.processes import wait_until

SECONDS = 120.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_the_stop_and_nothing_more(in_child: InChild, number: signal.Signals) -> None:
    def work() -> None:
        before = signal.getsignal(number)
        stop = Stop()
        with drained_by_signals(stop, "test"):
            assert not stop.requested
            os.kill(os.getpid(), number)
            wait_until(lambda: stop.requested, SECONDS)
        assert signal.getsignal(number) is before

    in_child(work)


def test_a_process_that_does_not_leave_in_time_ends_with_status_0(start_child: StartChild) -> None:
    def work() -> None:
        draining.DRAIN_SECONDS = 0.2
        with drained_by_signals(Stop(), "test"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    child = start_child(work)
    child.join(SECONDS)
    assert child.exitcode == 0


def test_in_another_thread_than_the_main_one_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with drained_by_signals(Stop(), "test"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
