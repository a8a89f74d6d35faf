"""A private broker, a worker process and a client: fixtures for the tests of a room that harm none of them, imported by its ``conftest.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import shmbroker
from shmbroker.client.channel import Channel
from tests.processes import worker_process

LANES = [("shm", "sem"), ("shm", "poll"), ("zmq", "auto")]


@pytest.fixture(scope="package")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker() as broker:
        yield broker


@pytest.fixture(scope="package")
def worker(broker: shmbroker.LocalBroker) -> Iterator[int]:
    with worker_process() as process:
        yield process.pid


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="64M", place_timeout=1.0) as client:
        yield client


@pytest.fixture(params=LANES, ids=["shm-sem", "shm-poll", "zmq"])
def channel(request: pytest.FixtureRequest, client: shmbroker.Client, worker: int) -> Channel:
    lane, doorbell = request.param
    return client.channel("test", lane=lane, doorbell=doorbell)
