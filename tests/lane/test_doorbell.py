"""Doorbells: what a bell does when it is rung, waited for and closed, and the fence between a frame and a look."""

from __future__ import annotations

import threading

import posix_ipc
import pytest

from shmbroker.lane import doorbell
from shmbroker.lane.doorbell import PollingBell, SemaphoreBell, fence
from shmbroker.settings.kinds import Doorbell
from tests.lane.bells import DEADLINE_SECONDS, BellNames, both_bells


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
    for bell in both_bells(bell_names):
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


def test_bells_tell_their_kind(bell_names: BellNames) -> None:
    assert [bell.kind for bell in both_bells(bell_names)] == [Doorbell.SEM, Doorbell.POLL]


def test_a_fence_may_be_passed_by_many_threads() -> None:
    threads = [threading.Thread(target=lambda: [fence() for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
