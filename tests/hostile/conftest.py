"""A broker, a worker, and an honest client that calls it all the while: after each test here they must be as if nothing had been."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import shmbroker
from shmbroker.client.local_broker import stop_process
from tests.hostile.peer import Footprint
from tests.processes import PROGRAMS, worker_process


class HonestClient:
    """``tests/programs/honest_client.py`` at work."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.calls = 0

    def check(self) -> int:
        """Calls since the last time; each must have been right, and there must have been some since this was asked."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(b"\n")
        stdin.flush()
        told = stdout.readline().decode()
        calls, failed, wrong, first = told.split(" ", 3)
        assert (failed, wrong) == ("0", "0"), f"of {calls} honest calls {failed} failed, {wrong} were wrong; first: {first}"
        since, self.calls = int(calls) - self.calls, int(calls)
        assert since > 0
        return since


@contextlib.contextmanager
def honest_client(service: str = "test") -> Iterator[HonestClient]:
    command = [sys.executable, str(PROGRAMS / "honest_client.py"), service]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield HonestClient(process)
        finally:
            stop_process(process)


@pytest.fixture(scope="package")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker(log_level="error") as broker:
        yield broker


@pytest.fixture(scope="package")
def worker(broker: shmbroker.LocalBroker) -> Iterator[Footprint]:
    with worker_process(KEPT_BYTES=str(1 << 20)) as process:  # whose memory is not to grow
        yield Footprint(process.pid)


@pytest.fixture(scope="package")
def _honest(worker: Footprint) -> Iterator[HonestClient]:
    with honest_client() as client:
        yield client


@pytest.fixture
def honest(_honest: HonestClient, worker: Footprint, broker: shmbroker.LocalBroker) -> Iterator[HonestClient]:
    """Calls before, during and after the test, none of them disturbed; worker and broker live."""
    _honest.check()
    yield _honest
    _honest.check()
    assert worker.alive()
    assert Footprint(broker.pid).alive()


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    """Whose process means no good."""
    with shmbroker.connect(arena="256K", channels=4, depth=1024, name="hostile") as client:
        yield client
