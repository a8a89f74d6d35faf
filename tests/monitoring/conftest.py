"""A broker with metrics, a worker, and a client that calls without end, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from shmbroker.client.local_broker import stop_process
from tests.processes import PROGRAMS, worker_process

SCRAPE_SECONDS = 120.0


@dataclass
class Metered:
    """A broker with ``/metrics``. ``environment`` points other processes at it."""

    process: subprocess.Popen[bytes]
    port: int
    environment: dict[str, str]

    def get(self, path: str) -> tuple[int, str]:
        """One request."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=SCRAPE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def families(self) -> dict[str, Metric]:
        """One scrape, read by the library's own parser."""
        status, text = self.get("/metrics")
        assert status == 200
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, sample: str, **labels: str) -> float | None:
        """The one sample of that name with these labels; None when there is none."""
        found = [
            one.value
            for family in self.families().values()
            for one in family.samples
            if one.name == sample and labels.items() <= one.labels.items()
        ]
        assert len(found) <= 1, found
        return found[0] if found else None


MeteredBroker = Callable[..., contextlib.AbstractContextManager[Metered]]


@pytest.fixture
def metered_broker(instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> MeteredBroker:
    """Starts a broker that serves metrics on any port."""

    @contextlib.contextmanager
    def start(port: int = 0) -> Iterator[Metered]:
        environment = {"SHMBROKER_INSTANCE": instance, "SHMBROKER_RUNTIME_DIR": str(short_folder)}
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        command = [sys.executable, "-m", "shmbroker", "serve", "--until-exit", str(os.getpid()), "--metrics-port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stderr is not None
        assert process.stdout is not None
        lines: list[str] = []
        try:
            first = process.stderr.readline().decode()
            assert process.stdout.readline() == b"ready\n", first
            lines.append(first)
            # Who logs into a full pipe would stop.
            reader = threading.Thread(target=process.stderr.read, daemon=True)
            reader.start()
            match = re.search(r"http://127\.0\.0\.1:(\d+)/metrics", first)
            yield Metered(process, int(match[1]) if match else 0, {**environment, "first_line": first})
        finally:
            stop_process(process)
            reader.join()
            process.stderr.close()

    return start


@pytest.fixture
def metered(metered_broker: MeteredBroker) -> Iterator[Metered]:
    """A broker with metrics, and a worker that offers service ``test``."""
    with metered_broker() as metered, worker_process():
        yield metered


@pytest.fixture
def caller(metered: Metered) -> Iterator[subprocess.Popen[bytes]]:
    """A client called ``caller`` that calls without end and counts its calls on standard output when it is told to stop."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "caller.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=False
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        assert process.stdin is not None
        process.stdin.close()
        stop_process(process)
