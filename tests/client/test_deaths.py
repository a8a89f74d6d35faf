"""Deaths, departures and the broker: real processes, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.commands.status import as_dict
from shmbroker.control.status import ask
from shmbroker.memory.reaper import objects
from shmbroker.monitoring.figures import read_figures
from tests.processes import run, running, submissions_taken, wait_until, worker_process

CLIENT = "import shmbroker, sys; c = shmbroker.connect(arena='1M'); x = c.empty((4,)); print('ready', flush=True); sys.stdin.read()"

MAKER = """
import sys
import tempfile
import threading
from shmbroker.memory.segment import Geometry, make_segment

hold = make_segment(sys.argv[1], Geometry(4096), instance="x", owner="0", owner_pid=0)
print("made", flush=True)
sys.stdin.read()
"""
"""Makes a segment and holds it until it dies."""


@pytest.fixture
def broker() -> Iterator[shmbroker.LocalBroker]:
    """A broker for one test alone: these tests count what is left."""
    with shmbroker.local_broker() as broker:
        yield broker


def kinds(instance: str) -> list[str]:
    return sorted(name.kind for name in objects(instance))


def test_a_killed_client_leaves_nothing_behind(broker: shmbroker.LocalBroker) -> None:
    process = subprocess.Popen([sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert kinds(broker.instance) == ["bell", "segment"]
        process.kill()
        process.wait()
        wait_until(lambda: not kinds(broker.instance))
    finally:
        process.kill()
        process.communicate()


def test_a_client_that_closes_leaves_nothing_behind_at_once(broker: shmbroker.LocalBroker) -> None:
    with shmbroker.connect(arena="1M") as client:
        tensor = client.empty((4,)).fill_(7.0)
        assert kinds(broker.instance) == ["bell", "segment"]
    assert kinds(broker.instance) == []
    assert tensor.tolist() == [7.0] * 4, "a living tensor keeps its memory"


def test_callers_of_a_killed_worker_are_told_and_the_client_goes_on_with_another(broker: shmbroker.LocalBroker) -> None:
    with shmbroker.connect(arena="1M") as client:
        for lane in ("shm", "zmq"):
            with worker_process("mortal") as process:
                channel = client.channel("mortal", lane=lane)
                die = channel.bind("die", out_spec=lambda x: x)
                x = client.empty((4,)).fill_(1.0)
                with pytest.raises(
                    shmbroker.WorkerLost, match=f"worker 'test-worker' \\(pid {process.pid}, dead\\) died before it answered"
                ):
                    die(x)
                with pytest.raises(shmbroker.WorkerLost, match="open a new channel once a worker offers 'mortal' again"):
                    die(x)
                channel.close()
            wait_until(lambda: not ask(None).peers[1:])
            with worker_process("mortal"):
                assert client.channel("mortal", lane=lane).bind("double")(x).tolist() == [2.0] * 4


def test_calls_go_on_without_the_broker_and_everyone_is_known_to_the_next_one(broker: shmbroker.LocalBroker) -> None:
    with worker_process(), shmbroker.connect(arena="1M") as client:
        double = client.channel("test").bind("double")
        x = client.empty((4,)).fill_(1.0)
        os.kill(broker.pid, signal.SIGKILL)
        os.waitpid(broker.pid, 0)
        for _ in range(100):
            assert double(x).tolist() == [2.0] * 4
        with running(sys.executable, "-m", "shmbroker", "serve", "--instance", broker.instance) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == b"ready\n"
            wait_until(lambda: sorted(peer.role for peer in ask(None).peers) == ["client", "worker"])
            assert double(x).tolist() == [2.0] * 4
            assert "bell segment" in " ".join(kinds(broker.instance))


def test_a_worker_finishes_what_runs_when_it_is_told_to_stop(broker: shmbroker.LocalBroker) -> None:
    with worker_process() as process, shmbroker.connect(arena="1M") as client:
        channel = client.channel("test")
        slow = channel.bind("sleep", seconds=0.5)
        future = slow.submit(torch.ones(2))
        wait_until(lambda: submissions_taken(channel) == 1)
        process.send_signal(signal.SIGTERM)
        assert future.result(timeout=120).tolist() == [1.0, 1.0]
        assert process.wait(300) == 0


@pytest.mark.parametrize("op", ["sleep", "compute"])
def test_a_worker_that_is_told_to_stop_does_not_wait_for_an_op_without_end(broker: shmbroker.LocalBroker, op: str) -> None:
    """Whatever the op does: it sleeps, or computes without a line of Python; exit status 0 within the limit, and nothing left behind."""
    with worker_process(DRAIN_SECONDS="0.3") as process, shmbroker.connect(arena="1M") as client:
        channel = client.channel("test")
        futures = [channel.bind(op, seconds=3600.0).submit(torch.ones(2)), channel.bind("add").submit(torch.ones(2))]
        wait_until(lambda: submissions_taken(channel) >= 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        for future in futures:
            with pytest.raises((shmbroker.WorkerLost, shmbroker.WorkerDraining)):
                future.result(timeout=300)
    wait_until(lambda: not list(objects(broker.instance)))


def test_status_lists_workers_services_segments_and_channels(broker: shmbroker.LocalBroker) -> None:
    with worker_process() as process, shmbroker.connect(arena="1M", name="someone") as client:
        held = client.empty((1000,), torch.uint8)
        channels = [client.channel("test", lane="shm", doorbell="poll"), client.channel("test", lane="zmq")]
        for channel in channels:
            channel.bind("double")(torch.ones(2))

        def told() -> dict[str, object]:
            done = run(sys.executable, "-m", "shmbroker", "status", "--json")
            assert done.returncode == 0, done.stderr
            report: dict[str, object] = json.loads(done.stdout)
            return report

        wait_until(lambda: len(ask(None).peers[1].stats.channels) == 2 and all(c.calls for c in ask(None).peers[1].stats.channels))
        status = told()
        assert status["broker"]["pid"] == broker.pid  # type: ignore[index]
        assert [worker["pid"] for worker in status["workers"]] == [process.pid]  # type: ignore[index, attr-defined]
        assert list(status["services"]) == ["test"]  # type: ignore[call-overload]
        someone = status["clients"][0]  # type: ignore[index]
        assert someone["name"] == "someone"
        assert someone["segment_bytes"] > 1 << 20
        assert 0 <= someone["silent_seconds"] <= someone["age_seconds"]
        assert someone["stats"]["arena"]["held_bytes"] >= held.nbytes
        assert someone["stats"]["arena"]["total_bytes"] == 1 << 20
        assert [c["socket_bytes"] > 0 for c in someone["stats"]["channels"]] == [False, True]
        assert [(c["lane"], c["doorbell"], c["control"]) for c in someone["stats"]["channels"]] == [
            ("shm", "poll", "ipc"),
            ("zmq", "socket", "ipc"),
        ]
        table = run(sys.executable, "-m", "shmbroker", "status").stdout
        assert "test-worker" in table
        assert "someone" in table
        assert as_dict(ask(None)).keys() == status.keys()


def test_gc_unlinks_what_nobody_holds_and_nothing_else(broker: shmbroker.LocalBroker) -> None:
    with shmbroker.connect(arena="1M"):
        os.kill(broker.pid, signal.SIGKILL)
        os.waitpid(broker.pid, 0)
        name = f"/shmbroker.{broker.instance}.segment.{'0' * 16}"
        process = subprocess.Popen([sys.executable, "-c", MAKER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        assert "0 reaped" in run(sys.executable, "-m", "shmbroker", "gc").stdout
        process.kill()
        process.communicate()
        done = json.loads(run(sys.executable, "-m", "shmbroker", "gc", "--json").stdout)
        assert [one["name"] for one in done["reaped"]] == [f"shmbroker.{broker.instance}.segment.{'0' * 16}"]
        assert len(done["kept"]) == 2
    assert kinds(broker.instance) == []


def test_a_forked_child_can_neither_use_nor_keep_alive_its_parents_client(broker: shmbroker.LocalBroker) -> None:
    with shmbroker.connect(arena="1M") as client:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                client.empty((1,))
            except shmbroker.ChannelError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        told = os.read(read, 4096).decode()
        os.close(read)
        assert told == f"this client belongs to process {os.getpid()}: connect() anew after a fork"
        assert client.empty((1,)).numel() == 1


def test_a_broker_that_dies_with_its_starter_leaves_nothing(tmp_path: Path) -> None:
    starter = (
        "import shmbroker, sys, time\n"
        "with shmbroker.local_broker() as b:\n"
        "    c = shmbroker.connect(arena='1M'); print(b.instance, b.pid, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    instance, pid = process.stdout.readline().split()
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert kinds(instance) == []


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_forked_child_cannot_call_and_so_never_takes_its_parents_answer(broker: shmbroker.LocalBroker) -> None:
    with worker_process(), shmbroker.connect(arena="1M") as client:
        double = client.channel("test").bind("double")
        double(torch.ones(1))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                double(torch.ones(1))
            except shmbroker.ChannelError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        assert b"connect() anew after a fork" in os.read(read, 4096)
        os.close(read)
        assert double(torch.full((1,), 100.0)).item() == 200.0


def test_a_client_that_closed_gives_its_memory_back_at_both_ends_and_the_worker_remembers_its_calls(broker: shmbroker.LocalBroker) -> None:
    with worker_process() as process:
        clients = []
        for lane in ("shm", "zmq", "shm"):
            client = shmbroker.connect(arena="1M")
            clients.append(client)
            channel = client.channel("test", lane=lane)
            x = client.empty((4,)).fill_(1.0)
            assert channel.bind("double")(x).tolist() == [2.0] * 4
            del x
            client.close()
            client.close()
        assert broker.instance not in "".join(line for line in maps_of(os.getpid()).splitlines() if "segment" in line)
        wait_until(lambda: "segment" not in maps_of(process.pid))
        wait_until(lambda: [peer.stats.calls for peer in ask(None).peers] == [3])


def test_a_demo_that_is_killed_leaves_nothing() -> None:
    tmp_path = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    process = subprocess.Popen(
        [sys.executable, "-m", "shmbroker", "demo", "--json"], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        wait_until(lambda: bool(list(tmp_path.glob("shmbroker-*/*.sock"))))
        instance = next(tmp_path.glob("shmbroker-*/*.sock")).name.split(".")[0]
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not kinds(instance) and not list(tmp_path.glob("shmbroker-*")), 20.0)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("doorbell", ["sem", "poll"])
def test_a_channel_that_is_opened_while_another_threads_call_runs_is_served_meanwhile(broker: shmbroker.LocalBroker, doorbell: str) -> None:
    with worker_process("first"), worker_process("second"), shmbroker.connect(arena="1M") as client:
        first = client.channel("first", doorbell=doorbell)
        slow = first.bind("sleep", seconds=2.0)
        slow_call = threading.Thread(target=lambda: slow.submit(torch.ones(1)).exception())
        slow_call.start()
        while not first.outstanding:
            pass
        assert client.channel("second", doorbell=doorbell).bind("scale", factor=2.0)(torch.ones(1)).item() == 2.0
        assert slow_call.is_alive(), "answered while the other call still ran"
        first.close()
        slow_call.join()


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_a_worker_that_is_told_to_stop_finishes_the_running_call_before_it_leaves(broker: shmbroker.LocalBroker, lane: str) -> None:
    """Else its client would take it for gone, and place other tensors where the call still writes (A5)."""
    with worker_process("leaving") as process, shmbroker.connect(arena="1M") as client:
        channel = client.channel("leaving", lane=lane)
        future = channel.bind("sleep", seconds=1.5).submit(client.empty((1024,)).fill_(3.0))
        wait_until(lambda: [one.run_calls for one in read_figures(client.segment.name).channels] == [1])
        process.send_signal(signal.SIGTERM)
        assert future.result().tolist() == [3.0] * 1024
        assert process.wait(300) == 0
