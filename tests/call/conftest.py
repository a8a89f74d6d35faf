"""What the tests of this room share."""

from __future__ import annotations

import pytest

import shmbroker
from shmbroker.call import compiled_op, completions
from shmbroker.call.completions import CompletionLoop
from shmbroker.client.channel import Channel
from tests.call.fake_sources import Clock, FakeSource, HandRungBell, WatchedLocks
from tests.peers import LANES, broker, client, worker

__all__ = ["broker", "client", "worker"]


@pytest.fixture(params=[*LANES, ("shm", "python")], ids=["shm-sem", "shm-poll", "zmq", "shm-calls-in-python"])
def channel(request: pytest.FixtureRequest, client: shmbroker.Client, worker: int, monkeypatch: pytest.MonkeyPatch) -> Channel:
    """By each lane and doorbell; and with the ordinary calls made in Python, which are compiled else."""
    lane, doorbell = request.param
    if doorbell == "python":
        monkeypatch.setattr(compiled_op, "COMPILED", False)
        doorbell = "sem"
    return client.channel("test", lane=lane, doorbell=doorbell)


@pytest.fixture
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost word is not healed in time."""
    monkeypatch.setattr(completions, "RECHECK_SECONDS", 600.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that deadlines are compared with, which passes when the test says so."""
    clock = Clock()
    monkeypatch.setattr(completions, "time", clock)
    return clock


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> WatchedLocks:
    """The locks of loops that are made from now on."""
    locks = WatchedLocks()
    monkeypatch.setattr(completions, "threading", locks)
    return locks


@pytest.fixture
def bell() -> HandRungBell:
    return HandRungBell()


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def loop(bell: HandRungBell, source: FakeSource) -> CompletionLoop:
    """Over ``source``, its waiters blocked on ``bell``."""
    loop = CompletionLoop(bell.block)
    loop.add(source)
    return loop
