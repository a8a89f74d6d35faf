"""A worker in a plain script tells that it is ready and what fails; one whose program has set up logging says it there alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.systemd.journal import AT_ONCE
from tests.processes import running, wait_until

SCRIPT = """
import shmbroker
{before}
worker = shmbroker.Worker("plain", name="plain-worker")
@worker.op(out_spec=lambda x: x)
def fail(x): raise ValueError("no such luck")
@worker.op(out_spec=lambda x: x)
def double(x): return x * 2
worker.serve(lambda: print("ready", flush=True))
"""


@contextmanager
def plain_worker(said: Path, before: str = "") -> Iterator[subprocess.Popen[bytes]]:
    with said.open("wb") as stderr:
        process = subprocess.Popen((sys.executable, "-c", SCRIPT.format(before=before)), stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", said.read_text()
        yield process
    finally:
        process.terminate()
        process.wait(300)
        assert process.stdout is not None
        process.stdout.close()


def test_a_plain_script_says_that_it_is_ready_and_each_call_that_failed_but_not_the_same_without_end(
    broker: shmbroker.LocalBroker, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    with plain_worker(said), broker.connect(arena="1M") as client:
        assert f"plain-worker is ready: service 'plain' on instance '{broker.instance}', ops fail, double" in said.read_text()
        fail = client.channel("plain").bind("fail")
        for count in (1, 2):
            with pytest.raises(shmbroker.RemoteOpError):
                fail(torch.ones(1))
            wait_until(lambda count=count: said.read_text().count("failed: ValueError: no such luck") == count)  # type: ignore[misc]
        for _ in range(5 * AT_ONCE):
            with pytest.raises(shmbroker.RemoteOpError):
                fail(torch.ones(1))
        assert said.read_text().count("failed: ValueError: no such luck") < 5 * AT_ONCE


@pytest.mark.parametrize(
    ("before", "heard"),
    [
        ("import logging; logging.basicConfig(level='WARNING', format='MINE %(message)s')", False),
        ("import logging; logging.basicConfig(level='INFO', format='MINE %(message)s')", True),
        ("import logging; logging.getLogger('shmbroker').addHandler(logging.NullHandler())", False),
        ("import os; os.environ['SHMBROKER_LOG_LEVEL'] = 'error'", False),
    ],
    ids=["warnings of its own", "all of its own", "silent", "a setting"],
)
def test_a_program_that_has_set_up_logging_keeps_its_own(broker: shmbroker.LocalBroker, tmp_path: Path, before: str, heard: bool) -> None:
    said = tmp_path / "said"
    with plain_worker(said, before):
        text = said.read_text()
    assert ("is ready" in text) is heard
    assert all(line.startswith("MINE ") for line in text.splitlines())


def test_nothing_of_it_stays_when_the_worker_has_ended(broker: shmbroker.LocalBroker) -> None:
    code = (
        "import logging, shmbroker; w = shmbroker.Worker('plain'); w.serve(w.stop); "
        "ours = logging.getLogger('shmbroker'); print(ours.handlers, ours.level)"
    )
    with running(sys.executable, "-c", code) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"[] 0\n"
