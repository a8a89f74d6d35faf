"""Workers are shared: channels go to the worker with the fewest, and a client need not wait for another's long call."""

from __future__ import annotations

import collections
import os
import signal
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

ROWS = 6400
"""In pieces of 64 rows, 20 ms each while the gate is shut: 2 s."""


@pytest.fixture
def other() -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="16M", name="other") as other:
        yield other


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    gate = tmp_path / "gate"
    yield gate
    gate.touch()


def rows(client: shmbroker.Client, count: int = ROWS) -> torch.Tensor:
    x = client.empty((1, count, 4))
    x.copy_(torch.arange(count * 4).view(1, count, 4))
    return x


def has_begun(client: shmbroker.Client) -> bool:
    """Whether a worker has told of a call of the client that it runs, or has run."""
    names = [f"/{name.file}" for name in objects(client.instance) if name.kind == "segment" and name.owner == client.id]
    return any(channel.run_calls for name in names for channel in read_figures(name).channels)


# --- which worker -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_workers(broker: shmbroker.LocalBroker) -> Iterator[None]:
    with worker_process("pair", WORKER_NAME="left"), worker_process("pair", WORKER_NAME="right"):
        yield


def test_six_clients_that_come_at_one_instant_are_three_on_each_of_two_workers(two_workers: None) -> None:
    clients = [shmbroker.connect(arena="1M") for _ in range(6)]
    at_once, names = threading.Barrier(6), []

    def open_one(client: shmbroker.Client) -> None:
        at_once.wait()
        names.append(client.channel("pair").worker_name)

    threads = [threading.Thread(target=open_one, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert collections.Counter(names) == {"left": 3, "right": 3}
    for client in clients:
        client.close()


def test_a_channel_goes_to_where_channels_were_closed(two_workers: None, client: shmbroker.Client) -> None:
    channels = [client.channel("pair") for _ in range(4)]
    for channel in channels:
        if channel.worker_name == "right":
            channel.close()
    assert [client.channel("pair").worker_name for _ in range(2)] == ["right", "right"]


def test_a_worker_is_chosen_by_its_name(two_workers: None, client: shmbroker.Client) -> None:
    assert [client.channel("pair", worker="right").worker_name for _ in range(3)] == ["right"] * 3


def test_a_name_that_no_worker_has_is_one_error_that_tells_those_there_are(two_workers: None, client: shmbroker.Client) -> None:
    with pytest.raises(shmbroker.NoSuchService, match=r"no worker named 'middle' offers service 'pair'.*'left', 'right'.*name one of them"):
        client.channel("pair", worker="middle", wait=0.0)
    with pytest.raises(shmbroker.BadInput, match="named by a string"):
        client.channel("pair", worker=3)  # type: ignore[arg-type]


def test_a_worker_that_does_not_say_how_many_it_has_is_the_last_to_be_asked(two_workers: None, client: shmbroker.Client) -> None:
    with worker_process("pair", WORKER_NAME="silent") as silent:
        os.kill(silent.pid, signal.SIGSTOP)
        try:
            assert {client.channel("pair").worker_name for _ in range(3)} == {"left", "right"}
        finally:
            os.kill(silent.pid, signal.SIGCONT)


# --- whose turn ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_lane", ["shm", "zmq"])
@pytest.mark.parametrize("long_lane", ["shm", "zmq"])
def test_short_calls_have_their_turns_between_the_pieces_of_a_long_one(
    worker: int, client: shmbroker.Client, other: shmbroker.Client, gate: Path, long_lane: str, short_lane: str
) -> None:
    """W1."""
    double = other.channel("test", lane=short_lane).bind("double")
    double_rows = client.channel("test", lane=long_lane).bind("double_rows", gate=str(gate))
    double(torch.ones(1))
    for x in (rows(client, 640), rows(client)):  # the first is tried out on copies
        long = double_rows.submit(x)
        assert [double(torch.ones(1)).item() for _ in range(5)] == [2.0] * 5
        assert not long.done()
        if x.shape[1] == ROWS:
            gate.touch()
        assert torch.equal(long.result(), x * 2)


def test_a_flood_of_long_calls_keeps_nobody_waiting(worker: int, client: shmbroker.Client, other: shmbroker.Client, gate: Path) -> None:
    """W2."""
    double = other.channel("test").bind("double")
    floods = [client.channel("test").bind("double_rows", gate=str(gate)) for _ in range(4)]
    x = rows(client)
    long = [flood.submit(x) for _ in range(2) for flood in floods]
    assert [double(torch.ones(1)).item() for _ in range(5)] == [2.0] * 5
    assert not all(one.done() for one in long)
    gate.touch()
    for one in long:
        one.result()


def test_an_error_in_one_piece_ends_the_call_and_nothing_else(
    worker: int, client: shmbroker.Client, other: shmbroker.Client, gate: Path
) -> None:
    gate.touch()
    other.channel("test").bind("double")(torch.ones(1))
    double_rows = client.channel("test").bind("double_rows", gate=str(gate))
    x = rows(client, 640)
    x[0, 500] = float("inf")
    for _ in range(2):
        with pytest.raises(shmbroker.RemoteOpError, match="is infinite"):
            double_rows(x)
    x[0, 500] = 1.0
    assert torch.equal(double_rows(x), x * 2)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_a_channel_that_is_closed_in_the_midst_of_a_call_in_pieces_is_closed_at_once(
    worker: int, client: shmbroker.Client, other: shmbroker.Client, gate: Path, lane: str
) -> None:
    double = other.channel("test").bind("double")
    channel = client.channel("test", lane=lane)
    long = channel.bind("double_rows", gate=str(gate)).submit(rows(client))
    double(torch.ones(1))
    channel.close()
    with pytest.raises(shmbroker.WorkerLost, match="the channel was closed"):
        long.result()
    assert double(torch.ones(1)).item() == 2.0
    again = client.channel("test", lane=lane)
    gate.touch()
    x = rows(client, 640)
    assert torch.equal(again.bind("double_rows", gate=str(gate))(x), x * 2)


CALLER = """
import sys
import shmbroker
client = shmbroker.connect(arena="16M", name="caller")
long = client.channel("test", lane=sys.argv[2]).bind("double_rows", gate=sys.argv[1]).submit(client.empty((1, 6400, 4)).fill_(1))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_a_client_that_is_killed_in_the_midst_of_a_call_in_pieces_is_unmapped(
    worker: int, other: shmbroker.Client, gate: Path, lane: str
) -> None:
    channel = other.channel("test")
    double, mapped = channel.bind("double"), channel.bind("mapped_segments")
    double(torch.ones(1))
    process = subprocess.Popen([sys.executable, "-c", CALLER, str(gate), lane], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    assert double(torch.ones(1)).item() == 2.0
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    wait_until(lambda: mapped(torch.ones(1)).item() == 1)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_a_worker_that_is_told_to_stop_in_the_midst_of_a_call_in_pieces_finishes_it(
    client: shmbroker.Client, other: shmbroker.Client, gate: Path, lane: str
) -> None:
    with worker_process("stopping") as process:
        double = other.channel("stopping").bind("double")
        long = client.channel("stopping", lane=lane).bind("double_rows", gate=str(gate)).submit(x := rows(client))
        double(torch.ones(1))
        wait_until(lambda: has_begun(client))
        assert not long.done()
        os.kill(process.pid, signal.SIGTERM)
        assert torch.equal(long.result(), x * 2)
        assert process.wait(60) == 0
        with pytest.raises((shmbroker.WorkerDraining, shmbroker.WorkerLost)):
            double(torch.ones(1))


def test_two_long_calls_of_two_clients_end_in_turns(worker: int, client: shmbroker.Client, other: shmbroker.Client, gate: Path) -> None:
    """W1: neither is over before the other has begun."""
    first = client.channel("test").bind("double_rows", gate=str(gate))
    second = other.channel("test").bind("double_rows", gate=str(gate))
    x, y = rows(client), rows(other, 640)
    one, two = first.submit(x), second.submit(y)
    assert torch.equal(two.result(), y * 2)
    assert not one.done()
    gate.touch()
    assert torch.equal(one.result(), x * 2)


# --- as much as a worker takes --------------------------------------------------------------------------------------------------------------


def test_a_worker_with_as_many_channels_as_it_takes_refuses_and_the_next_one_is_asked(client: shmbroker.Client) -> None:
    with worker_process("few", WORKER_NAME="one", MAX_CHANNELS="1"), worker_process("few", WORKER_NAME="two", MAX_CHANNELS="2"):
        channels = [client.channel("few") for _ in range(3)]
        assert collections.Counter(channel.worker_name for channel in channels) == {"one": 1, "two": 2}
        with pytest.raises(shmbroker.Busy, match=r"has [12] channels open, as many as it takes"):
            client.channel("few")
        with pytest.raises(shmbroker.Busy, match="has 1 channels open, as many as it takes"):
            client.channel("few", worker="one")
        channels[0].close()
        assert client.channel("few").worker_name == channels[0].worker_name


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_calls_beyond_the_rows_that_may_wait_are_refused_and_may_be_made_again(
    client: shmbroker.Client, other: shmbroker.Client, gate: Path, lane: str
) -> None:
    """W5: and another client, which has nothing waiting, is let in."""
    with worker_process("narrow", MAX_WAITING_ROWS="10"):
        double = other.channel("narrow", lane=lane).bind("double")
        double(torch.ones(1))
        double_rows = client.channel("narrow", lane=lane).bind("double_rows", gate=str(gate))
        x, wide = rows(client, 6), rows(client, 640)
        long = double_rows.submit(wide)
        assert double(torch.ones(1)).item() == 2.0
        others = [double_rows.submit(x) for _ in range(4)]
        assert double(torch.ones(20, 1)).shape == (20, 1)
        gate.touch()
        assert torch.equal(long.result(), wide * 2)
        answers = []
        for one in others:
            try:
                answers.append(one.result().shape)
            except shmbroker.Busy as error:
                answers.append(str(error))
        assert answers[0] == (1, 6, 4)
        assert "6 rows wait, 6 more would be more than the 10 that may" in str(answers[1])
        assert "make the same call again in a moment" in str(answers[1])
        assert torch.equal(double_rows(x), x * 2)


def test_a_bound_on_waiting_rows_refuses_nobody_who_waits_for_each_call(client: shmbroker.Client, gate: Path) -> None:
    with worker_process("narrow", MAX_WAITING_ROWS="1"):
        gate.touch()
        double_rows = client.channel("narrow").bind("double_rows", gate=str(gate))
        x = rows(client, 640)
        for _ in range(3):
            assert torch.equal(double_rows(x), x * 2)
