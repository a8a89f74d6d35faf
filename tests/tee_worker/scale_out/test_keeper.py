"""A replica's broker and GPU worker end with it, however it ends; and whoever comes next reaps what it left. Needs no Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shmbroker.control.status import ask
from shmbroker.memory.reaper import objects
from tee_worker.scale_out.slot import Slot, host_word, instances
from tests.fleet import alive
from tests.processes import Process, running, wait_until

REPLICA = """
import sys
import torch
import shmbroker
from tee_worker.scale_out.options import Options
from tee_worker.scale_out.peers import Peers
peers = Peers(Options(model=sys.argv[1], service="tiny"), lambda text: print("failed:", text, flush=True))
client = shmbroker.connect(arena="16M", name="replica")
channel = client.failover_channel("tiny", wait=300, patience=300)
kept = client.empty((1000,), torch.float32)
print(peers.instance, flush=True)
for line in sys.stdin:
    if line.strip() == "end":
        break
    print(channel.trouble() or f"ok {channel.worker_pid}", flush=True)
client.close()
peers.close()
"""


@dataclass
class Kept:
    """A process that has peers as a replica has, and what they are."""

    process: Process
    instance: str
    folder: Path
    keeper: int
    broker: int
    worker: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.process.pid, self.keeper, self.broker, self.worker))


@pytest.fixture
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder))
    return short_folder / f"ray-{os.geteuid()}"


@contextlib.contextmanager
def kept(model: Path, folder: Path) -> Iterator[Kept]:
    import subprocess

    command = [sys.executable, "-c", REPLICA, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            instance = process.stdout.readline().decode().strip()
            assert instance in instances(folder), instance
            yield of(process, instance, folder)
        finally:
            process.kill()


def of(process: Process, instance: str, folder: Path) -> Kept:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHMBROKER_RUNTIME_DIR", str(folder))
        worker = next(peer.pid for peer in ask(instance).peers if "tiny" in peer.services)
    keeper = parent_of(worker)
    children = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal() and parent_of(int(one.name)) == keeper]
    (broker,) = set(children) - {worker}
    return Kept(process, instance, folder, keeper, broker, worker)


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def nothing_is_left(folder: Path, instance: str) -> bool:
    return not list(objects(instance)) and not list(folder.iterdir())


def test_all_of_a_replica_that_is_killed_ends_with_it_and_nothing_is_left(tiny: Path, folder: Path) -> None:
    with kept(tiny, folder) as one:
        assert list(objects(one.instance))
        one.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in one))
        wait_until(lambda: nothing_is_left(folder, one.instance))


def test_a_replica_that_ends_in_peace_waits_until_nothing_is_left(tiny: Path, folder: Path) -> None:
    with kept(tiny, folder) as one:
        assert one.process.stdin is not None
        one.process.stdin.write(b"end\n")
        one.process.stdin.flush()
        assert one.process.wait(300) == 0
        assert nothing_is_left(folder, one.instance)


def test_a_worker_and_a_broker_that_are_killed_are_started_anew(tiny: Path, folder: Path) -> None:
    with kept(tiny, folder) as one:
        os.kill(one.broker, signal.SIGKILL)
        os.kill(one.worker, signal.SIGKILL)
        assert one.process.stdin is not None
        assert one.process.stdout is not None

        def answers() -> bool:
            assert one.process.stdin is not None
            assert one.process.stdout is not None
            one.process.stdin.write(b"how\n")
            one.process.stdin.flush()
            word, _, pid = one.process.stdout.readline().decode().strip().partition(" ")
            return word == "ok" and int(pid) != one.worker

        wait_until(answers)


def test_who_comes_next_has_the_name_of_one_that_was_killed_with_its_keeper_and_reaps_what_it_left(tiny: Path, folder: Path) -> None:
    with kept(tiny, folder) as one:
        os.kill(one.broker, signal.SIGSTOP)  # it would see to it that nothing is left
        for pid in (one.keeper, one.broker, one.process.pid):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in one))
        one.process.wait(60)
        left = {name.file for name in objects(one.instance)}
        assert left
        with kept(tiny, folder) as another:
            assert another.instance == one.instance
            assert not left & {name.file for name in objects(one.instance)}
        wait_until(lambda: nothing_is_left(folder, one.instance))


def test_a_worker_that_cannot_start_is_told_with_where_its_words_are(tmp_path: Path, folder: Path) -> None:
    program = """
import sys
import threading
from tee_worker.scale_out.options import Options
from tee_worker.scale_out.peers import Peers
over = threading.Event()
told = []
peers = Peers(Options(model=sys.argv[1]), lambda text: (told.append(text), over.set()))
over.wait(300)
print(told[0])
peers.close()
"""
    with running(sys.executable, "-c", program, str(tmp_path / "none")) as process:
        assert process.stdout is not None
        assert b"the GPU worker of this replica ended with status 1, 3 times" in process.stdout.readline()
        process.wait(300)
    assert not list(folder.iterdir())


def test_two_replicas_on_one_host_have_different_slots_and_a_free_one_is_taken_again(short_folder: Path) -> None:
    first, second = Slot(short_folder), Slot(short_folder)
    names = [first.instance, second.instance]
    assert names == instances(short_folder)[:2]
    first.release()
    third = Slot(short_folder)
    assert third.instance == names[0]
    third.release()
    second.release()
    assert not list(short_folder.iterdir())


@pytest.mark.parametrize("host", ["node7", "Node7", "a.very.long.name.of.a.host.example", "", "x" * 64])
def test_a_hosts_name_becomes_part_of_an_instances_whatever_it_is(host: str) -> None:
    names = instances(Path("/run/shmbroker/ray-0"), host)
    assert len(set(names)) == len(names)
    for name in (names[0], names[-1]):
        from shmbroker.memory.names import check_instance

        assert check_instance(name) == name
    assert host_word("Node7") != host_word("node7")
