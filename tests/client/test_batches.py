"""A worker that computes several clients' calls together, over processes: each has its own results, whatever the others do."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.memory.reaper import objects
from shmbroker.monitoring.figures import read_figures
from tests.processes import wait_until, worker_process

CLIENTS = 4
SECONDS = 120.0


@pytest.fixture(params=["user", "all"])
def batching(broker: shmbroker.LocalBroker, request: pytest.FixtureRequest) -> Iterator[str]:
    with worker_process("batches", BATCH=request.param):
        yield "batches"


def batched_calls(instance: str) -> int:
    """Of all channels that are open."""
    names = [f"/{name.file}" for name in objects(instance) if name.kind == "segment"]
    return sum([channel.batched_calls for name in names for channel in read_figures(name).channels])


class Decoding:
    """Clients that call a slow op again and again, each in a thread, with rows of its own."""

    def __init__(self, stack: contextlib.ExitStack, service: str, gate: Path, count: int = CLIENTS) -> None:
        self.clients = [stack.enter_context(shmbroker.connect(arena="4M", name=f"decode {number}")) for number in range(count)]
        self.calls = [client.channel(service).bind("double_rows", gate=str(gate)) for client in self.clients]
        self.stop = threading.Event()
        self.made = [0] * count
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()
        stack.callback(self.join)

    def _run(self, number: int) -> None:
        x = self.clients[number].empty((1, 1 + number % 3, 4))
        while not self.stop.is_set():
            x.fill_(self.made[number] * len(self.clients) + number)
            try:
                if not torch.equal(self.calls[number](x), x * 2):
                    self.wrong.append(f"result {self.made[number]} of client {number}")
            except shmbroker.ShmBrokerError as error:
                self.wrong.append(f"client {number}: {error}")
                return
            self.made[number] += 1

    def join(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Never opened: each run of the op takes 20 ms, however many rows it has."""
    return tmp_path / "gate"


def test_each_client_has_its_own_results(broker: shmbroker.LocalBroker, batching: str, gate: Path) -> None:
    """B3."""
    with contextlib.ExitStack() as stack:
        decoding = Decoding(stack, batching, gate)
        wait_until(lambda: batched_calls(broker.instance) > 20 and min(decoding.made) > 10, SECONDS)
        decoding.join()
        assert decoding.wrong == []


@pytest.mark.parametrize(("value", "error"), [("inf", "a row of 1 is infinite"), ("nan", "SystemExit: 3")])
def test_an_error_is_that_of_the_call_that_it_is_of(
    broker: shmbroker.LocalBroker, batching: str, gate: Path, value: str, error: str
) -> None:
    """B4: and it is no other's, nor the worker's end. Its client is left alone for a while then."""
    with contextlib.ExitStack() as stack:
        decoding = Decoding(stack, batching, gate)
        client = stack.enter_context(shmbroker.connect(arena="4M", name="infinite"))
        call = client.channel(batching).bind("double_rows", gate=str(gate))
        x, failed = client.empty((1, 1, 4)), 0
        before = batched_calls(broker.instance)
        while batched_calls(broker.instance) < before + 20 or failed < 2:
            for _ in range(4):
                x.fill_(1.0)
                assert torch.equal(call(x), x * 2)
            x.fill_(float(value))
            with pytest.raises(shmbroker.RemoteOpError, match=error):
                call(x)
            failed += 1
        decoding.join()
        assert decoding.wrong == []


CALLER = """
import sys
import shmbroker
client = shmbroker.connect(arena="4M", name="caller")
call = client.channel("batches").bind("double_rows", gate=sys.argv[1])
x = client.empty((1, 1, 4)).fill_(1)
for count in range(1 << 30):
    call(x)
    if count == 20:
        print("ready", flush=True)
"""


def test_a_client_that_is_killed_harms_none_and_is_unmapped(broker: shmbroker.LocalBroker, batching: str, gate: Path) -> None:
    """B5."""
    with contextlib.ExitStack() as stack:
        decoding = Decoding(stack, batching, gate, 2)
        mapped = decoding.clients[0].channel(batching).bind("mapped_segments")
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-c", CALLER, str(gate)], stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.kill()
            process.wait()
            process.stdout.close()
            wait_until(lambda: mapped(torch.ones(1)).item() == 2, SECONDS)
        made = min(decoding.made)
        wait_until(lambda: min(decoding.made) > made + 5, SECONDS)
        decoding.join()
        assert decoding.wrong == []


def test_deadlines_are_kept(broker: shmbroker.LocalBroker, batching: str, gate: Path) -> None:
    """B2: a call that would be in time by itself is."""
    with contextlib.ExitStack() as stack:
        decoding = Decoding(stack, batching, gate, 2)
        wait_until(lambda: min(decoding.made) > 5, SECONDS)
        client = stack.enter_context(shmbroker.connect(arena="4M", timeout=30.0, name="in time"))
        call = client.channel(batching).bind("double_rows", gate=str(gate))
        x = client.empty((1, 1, 4)).fill_(3)
        for _ in range(10):
            assert torch.equal(call(x), x * 2)
        decoding.join()
        assert decoding.wrong == []


def test_a_word_that_is_not_known_is_refused() -> None:
    with pytest.raises(shmbroker.BadInput, match=r"batch 'everyone' is not known: give 'user' .*, 'all', or None"):
        shmbroker.Worker("batches", batch="everyone")  # type: ignore[arg-type]
