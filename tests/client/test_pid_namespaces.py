"""Peers in another pid namespace, where pids mean nothing: the living are never taken for gone, and the dead are noticed soon. Invariant H5."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.control import messages as m
from shmbroker.control.status import ask
from shmbroker.errors import BrokerUnreachable
from shmbroker.memory import names
from shmbroker.memory.reaper import objects
from tests.processes import PROGRAMS, freeze, stop_process, wait_until, worker_process

SILENT_SECONDS = 0.5
"""In the broker of these tests, after which a peer would be gone if silence meant anything."""

BROKER = """
import sys
from shmbroker.broker import peers
peers.SILENT_SECONDS = float(sys.argv.pop(1))
from shmbroker.commands.cli import main
main()
"""

CLIENT = """
import sys, torch, shmbroker
client = shmbroker.connect(arena="1M")
op = client.channel("test", lane=sys.argv[1]).bind("double")
print("ready", flush=True)
for line in sys.stdin:
    print(op(torch.full((2,), float(line)), timeout=300).tolist(), flush=True)
"""

HOLDS_THE_INTERPRETER = """
import ctypes, sys, threading
import shmbroker
client = shmbroker.connect(arena="1M")
print("ready", flush=True)
ctypes.PyDLL(None).usleep(int(sys.argv[1]))  # PyDLL: with the interpreter lock, so that no thread of Python runs
print("woke", flush=True)
sys.stdin.read()
"""

INSIDE = ("unshare", "--pid", "--mount-proc", "--fork", "--kill-child")


def _possible() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*INSIDE, "true"], capture_output=True, check=False).returncode == 0
    return False


pytestmark = pytest.mark.skipif(not _possible(), reason="a pid namespace of its own needs root, and unshare")


@pytest.fixture
def broker(instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder))
    monkeypatch.setenv("SHMBROKER_INSTANCE", instance)
    with started(sys.executable, "-c", BROKER, str(SILENT_SECONDS), "--log-level", "warning", "serve") as process:
        yield process


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has said that it is ready."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.stdin.close()
        stop_process(process)


def child_of(process: subprocess.Popen[bytes]) -> int:
    """The pid, here, of what ``unshare`` has forked."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def peers(role: str) -> list[m.PeerStatus]:
    return [peer for peer in ask(None).peers if peer.role == role]


def wait_for_silence(role: str) -> None:
    """Until a peer has been silent for much longer than the broker would ever have waited."""
    wait_until(lambda: peers(role)[0].silent_seconds > 4 * SILENT_SECONDS)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_a_client_that_is_stopped_for_long_is_not_taken_for_gone_and_its_channel_works_on(
    broker: subprocess.Popen[bytes], lane: str
) -> None:
    """H5."""
    with worker_process(), started(*INSIDE, sys.executable, "-c", CLIENT, lane) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        (known,) = peers("client")
        freeze(child_of(client))
        wait_for_silence("client")
        assert [peer.peer for peer in peers("client")] == [known.peer]
        assert {name.owner for name in objects()} >= {known.peer}
        os.kill(child_of(client), signal.SIGCONT)
        client.stdin.write(b"3\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"[6.0, 6.0]\n"
        os.kill(child_of(client), signal.SIGKILL)
        wait_until(lambda: not peers("client") and known.peer not in {name.owner for name in objects()})


def test_a_client_that_holds_the_interpreter_lock_for_long_is_not_taken_for_gone(broker: subprocess.Popen[bytes]) -> None:
    """H5."""
    with started(*INSIDE, sys.executable, "-c", HOLDS_THE_INTERPRETER, str(int(6e6 * SILENT_SECONDS))) as client:
        assert client.stdout is not None
        wait_for_silence("client")
        assert len(peers("client")) == 1
        assert client.stdout.readline() == b"woke\n"
        assert len(peers("client")) == 1


@pytest.mark.parametrize("named", [True, False], ids=["with its names", "whose names were taken away"])
def test_a_worker_that_is_stopped_for_long_is_not_taken_for_gone_and_a_killed_one_is_at_once(
    broker: subprocess.Popen[bytes], named: bool
) -> None:
    """H5."""
    with started(*INSIDE, sys.executable, str(PROGRAMS / "worker.py"), "test") as worker, shmbroker.connect(arena="1M") as client:
        op = client.channel("test").bind("double")
        x = client.empty((4,)).fill_(1.0)
        assert op(x).tolist() == [2.0] * 4
        (known,) = peers("worker")
        if not named:
            for name in objects():
                if name.owner == known.peer:
                    os.unlink(name.path)
        freeze(child_of(worker))
        wait_for_silence("worker")
        assert len(peers("worker")) == 1
        waiting = op.submit(x)
        os.kill(child_of(worker), signal.SIGCONT)
        assert waiting.result().tolist() == [2.0] * 4
        lost = client.channel("test").bind("sleep", seconds=600.0).submit(x, timeout=500.0)
        begun = time.monotonic()
        os.kill(child_of(worker), signal.SIGKILL)
        with pytest.raises(shmbroker.WorkerLost):
            lost.result()
        assert time.monotonic() - begun < 250.0, "told, and not its deadline waited out"
        wait_until(lambda: not peers("worker"))


def test_a_worker_that_dies_while_there_is_no_broker_is_noticed_too(broker: subprocess.Popen[bytes]) -> None:
    """By its socket, to which the kernel refuses connections from then on."""
    with started(*INSIDE, sys.executable, str(PROGRAMS / "worker.py"), "test") as worker, shmbroker.connect(arena="1M") as client:
        lost = client.channel("test").bind("sleep", seconds=600.0).submit(torch.ones(2), timeout=500.0)
        broker.kill()
        broker.wait()
        with pytest.raises(BrokerUnreachable):
            ask(None)
        os.kill(child_of(worker), signal.SIGKILL)
        with pytest.raises(shmbroker.WorkerLost):
            lost.result()
    for name in objects():
        if name.instance == os.environ["SHMBROKER_INSTANCE"]:
            os.unlink(f"{names.SHM_DIR}/{name.file}")
