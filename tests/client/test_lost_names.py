"""Names that are taken away under the living, as systemd-logind does at logout: whoever lives works on, and is reachable again by itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

import shmbroker
from shmbroker.client.channel import Channel
from shmbroker.control.endpoint import socket_path, worker_socket
from shmbroker.control.status import ask
from shmbroker.memory.reaper import objects
from tests.peers import LANES
from tests.processes import broker_process, freeze, run, wait_until, worker_process


@pytest.fixture
def broker() -> Iterator[shmbroker.LocalBroker]:
    """A broker for one test alone: its names are taken away."""
    with shmbroker.local_broker() as broker:
        yield broker


def log_out(instance: str) -> None:
    """What ``RemoveIPC=yes`` does."""
    for name in objects(instance):
        os.unlink(name.path)


def doubled(channel: Channel, x: torch.Tensor) -> list[float]:
    return channel.bind("double")(x).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("lane", "doorbell"), LANES)
def test_open_channels_work_on_and_old_and_new_clients_reach_the_worker(broker: shmbroker.LocalBroker, lane: str, doorbell: str) -> None:
    with worker_process(), shmbroker.connect(arena="1M") as client:
        before = client.empty((4,)).fill_(1.0)
        first = client.channel("test", lane=lane, doorbell=doorbell)
        op = first.bind("double")
        assert op(before).tolist() == [2.0] * 4
        for _ in range(2):  # one may log out more than once
            log_out(broker.instance)
            second = client.channel("test", lane=lane, doorbell=doorbell)
            after = client.empty((4,)).fill_(3.0)
            assert client.holds(after)
            assert not client.holds(before)
            for channel in (first, second):
                assert doubled(channel, before) == [2.0] * 4
                assert doubled(channel, after) == [6.0] * 4
            with shmbroker.connect(arena="1M") as newcomer:
                assert doubled(newcomer.channel("test", lane=lane, doorbell=doorbell), torch.ones(2)) == [2.0] * 2
        assert op(before).tolist() == [2.0] * 4
        assert len(client.channels) == 3
    wait_until(lambda: not list(objects(broker.instance)))


def test_a_worker_that_sleeps_is_woken_through_its_new_name(broker: shmbroker.LocalBroker) -> None:
    """With a wait of its own it would look by itself after 0.1 s at most; that every call of many waits for it is unlikely, not impossible."""
    with worker_process(SHMBROKER_SPIN="0"), shmbroker.connect(arena="1M", spin=0.0) as client:
        log_out(broker.instance)
        op = client.channel("test").bind("double")
        x = client.empty((4,)).fill_(1.0)
        for _ in range(50):
            assert op(x).tolist() == [2.0] * 4


def test_a_failover_channel_goes_on_after_a_logout(broker: shmbroker.LocalBroker) -> None:
    with worker_process() as first, worker_process(), shmbroker.connect(arena="1M") as client:
        channel = client.failover_channel("test", patience=30.0)
        op = channel.bind("double")
        x = client.empty((4,)).fill_(1.0)
        assert op(x).tolist() == [2.0] * 4
        log_out(broker.instance)
        os.kill(channel.worker_pid, signal.SIGKILL)
        if channel.worker_pid == first.pid:
            first.wait()
        assert op(x).tolist() == [2.0] * 4
        assert channel.failovers == 1


def test_sockets_of_the_living_stay_also_when_the_broker_is_started_anew(broker: shmbroker.LocalBroker) -> None:
    with worker_process() as process:
        (worker,) = ask(None).peers
        socket = worker_socket(socket_path(broker.instance).parent, broker.instance, "worker", worker.peer)
        os.kill(process.pid, signal.SIGSTOP)  # so that it does not say Hello before the new broker has looked around
        log_out(broker.instance)
        os.kill(broker.pid, signal.SIGKILL)
        os.waitpid(broker.pid, 0)
        with broker_process(broker.instance):
            assert run(sys.executable, "-m", "shmbroker", "gc").returncode == 0
            assert socket.exists()
            os.kill(process.pid, signal.SIGCONT)
            wait_until(lambda: len(ask(None).peers) == 1)
            assert socket.exists()
            with shmbroker.connect(arena="1M") as client:
                assert doubled(client.channel("test"), torch.ones(2)) == [2.0] * 2


def test_a_second_sound_worker_is_found_at_once(broker: shmbroker.LocalBroker) -> None:
    """Before any deadline: the first worker lives, and cannot be reached."""
    with worker_process() as first:
        freeze(first.pid)  # or it would have its socket again
        (known,) = ask(None).peers
        worker_socket(socket_path(broker.instance).parent, broker.instance, "worker", known.peer).unlink()
        with worker_process() as second, shmbroker.connect(arena="1M") as client:
            channel = client.channel("test")
            assert channel.worker_pid == second.pid
            assert doubled(channel, torch.ones(2)) == [2.0] * 2
        os.kill(first.pid, signal.SIGCONT)


def test_where_no_worker_can_be_reached_the_reason_is_that_of_the_first(broker: shmbroker.LocalBroker) -> None:
    with worker_process() as process, shmbroker.connect(arena="1M") as client:
        freeze(process.pid)
        (worker,) = [peer for peer in ask(None).peers if peer.role == "worker"]
        worker_socket(socket_path(broker.instance).parent, broker.instance, "worker", worker.peer).unlink()
        with pytest.raises(shmbroker.ChannelError, match=rf"\(pid {process.pid}\) does not answer"):
            client.channel("test")
        os.kill(process.pid, signal.SIGCONT)


def test_sockets_that_were_removed_are_bound_anew(broker: shmbroker.LocalBroker) -> None:
    """U4."""
    with worker_process():
        folder = socket_path(broker.instance).parent
        sockets = [socket_path(broker.instance), *folder.glob(f"{broker.instance}.worker.*.sock")]
        assert len(sockets) == 2
        modes = [path.stat().st_mode for path in sockets]
        for path in sockets:
            path.unlink()
        wait_until(lambda: all(path.exists() for path in sockets))
        assert [path.stat().st_mode for path in sockets] == modes
        with shmbroker.connect(arena="1M") as client:
            assert doubled(client.channel("test"), torch.ones(2)) == [2.0] * 2
