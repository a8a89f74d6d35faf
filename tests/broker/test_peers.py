"""The processes that a broker knows: who is believed, who is held for, who is taken for gone, and what is reaped then."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import zmq

import shmbroker
from shmbroker.broker import peers as peers_module
from shmbroker.broker.peers import SWEEP_SECONDS, Peers
from shmbroker.control import messages as m
from shmbroker.control.liveness import process_of, this_process
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold, is_held
from shmbroker.memory.reaper import objects
from shmbroker.memory.segment import make_segment, unlink_segment
from tests.conftest import StartChild
from tests.processes import run, running, wait_until, worker_process

SMALL = Geometry(1 << 16, channel_count=1, depth=1)
STATS = m.PeerStats(calls=7)
Sent = list[tuple[bytes, m.Message]]


@pytest.fixture
def sent() -> Sent:
    """What was sent to peers, by connection."""
    return []


@pytest.fixture
def poller() -> zmq.Poller:
    return zmq.Poller()


@pytest.fixture
def closed() -> set[bytes]:
    """Connections that are no more."""
    return set()


@pytest.fixture
def peers(instance: str, short_folder: Path, poller: zmq.Poller, sent: Sent, closed: set[bytes]) -> Iterator[Peers]:
    def connected(receiver: bytes) -> bool:
        return receiver not in closed

    peers = Peers(instance, short_folder, poller, lambda receiver, message: sent.append((receiver, message)), connected)
    yield peers
    for peer in peers.known():
        peers.leave(peer.sender, peer.hello.peer)
    peers.close()
    for name in objects(instance):
        unlink_segment(f"/{name.file}")


@pytest.fixture
def sitting(start_child: StartChild) -> ForkProcess:
    """A process that does nothing until it is killed."""
    return start_child(signal.pause)


def killed(process: ForkProcess) -> None:
    process.kill()
    process.join()


def made(instance: str, owner: str) -> Hold:
    """The hold of a fresh segment."""
    return make_segment(names.segment_name(instance, owner), SMALL, instance=instance, owner=owner, owner_pid=os.getpid())


def path_of(instance: str, owner: str) -> str:
    return names.SHM_DIR + names.segment_name(instance, owner)


def hello(peer: str, process: m.ProcessId, segment: str = "", **more: object) -> m.Hello:
    return m.Hello("client", peer, process, "somebody", "0", segment=segment, **more)  # type: ignore[arg-type]


# --- handovers --------------------------------------------------------------------------------------------------------------------------


def test_what_was_made_is_held_until_its_owner_says_hello_and_then_by_the_owner(peers: Peers, instance: str) -> None:
    owner = names.new_id()
    peers.hold_until_hello(owner, this_process(), made(instance, owner))
    peers.look_after()
    assert is_held(path_of(instance, owner))
    own = Hold.on(path_of(instance, owner))
    peers.join(b"a", hello(owner, this_process(), names.segment_name(instance, owner)))
    own.release()
    assert not is_held(path_of(instance, owner)), "the broker held nothing for one who can"


def test_a_handover_that_nobody_takes_is_reaped_after_its_time(peers: Peers, instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = names.new_id()
    peers.hold_until_hello(owner, this_process(), made(instance, owner))
    monkeypatch.setattr(peers_module, "HANDOVER_SECONDS", 0.0)
    peers.look_after()
    assert not os.path.exists(path_of(instance, owner))
    assert (peers.reaped_objects, peers.reaped_bytes >= SMALL.total_bytes) == (1, True)


def test_a_handover_to_a_process_that_dies_is_reaped_at_once(peers: Peers, instance: str, sitting: ForkProcess) -> None:
    owner = names.new_id()
    assert sitting.pid is not None
    peers.hold_until_hello(owner, process_of(sitting.pid), made(instance, owner))
    peers.look_after()
    assert os.path.exists(path_of(instance, owner))
    killed(sitting)
    peers.look_after()
    assert not os.path.exists(path_of(instance, owner))


def test_what_was_never_taken_over_is_reaped_when_the_broker_ends_and_what_the_living_hold_is_not(peers: Peers, instance: str) -> None:
    taken, left = names.new_id(), names.new_id()
    hold = made(instance, taken)
    peers.join(b"a", hello(taken, this_process(), names.segment_name(instance, taken)))
    peers.hold_until_hello(left, this_process(), made(instance, left))
    peers.close()
    assert [name.owner for name in objects(instance)] == [taken]
    hold.release()


# --- those that cannot lock (H4) --------------------------------------------------------------------------------------------------------


def test_the_broker_holds_for_a_process_that_cannot_lock_while_it_lives_and_not_longer(
    peers: Peers, instance: str, sitting: ForkProcess
) -> None:
    """H4."""
    owner = names.new_id()
    assert sitting.pid is not None
    peers.hold_until_hello(owner, process_of(sitting.pid), made(instance, owner))
    peers.join(b"a", hello(owner, process_of(sitting.pid), names.segment_name(instance, owner)))
    assert is_held(path_of(instance, owner)), "not by its owner, which has locked nothing"
    peers.reap("held by nobody")
    assert os.path.exists(path_of(instance, owner))
    killed(sitting)
    peers.look_after()
    assert not os.path.exists(path_of(instance, owner))


def test_the_broker_holds_no_longer_for_a_process_that_left_or_said_hello_anew(peers: Peers, instance: str) -> None:
    """H4."""
    owner = names.new_id()
    greeting = hello(owner, this_process(), names.segment_name(instance, owner))
    hold = made(instance, owner)
    hold.release()
    peers.join(b"a", greeting)
    peers.join(b"a", greeting)
    assert [len(peer.holds) for peer in peers.known()] == [1]
    peers.leave(b"a", owner)
    assert not os.path.exists(path_of(instance, owner))


LOCKLESS = """
import errno, fcntl, os, sys, time

def flock(fd, operation):
    if sys.argv[1] == "refused":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

fcntl.flock = flock
import torch, shmbroker
client = shmbroker.connect(arena="4M")
double = client.channel("test", doorbell="poll").bind("double")
print("ready", flush=True)
while True:
    x = client.empty((8,), torch.float32).fill_(2.0)
    assert double(x).sum() == 32.0
    time.sleep(0.05)
"""


@pytest.mark.parametrize("locking", ["refused", "seen by nobody else"])
def test_a_client_that_cannot_lock_keeps_its_segment_while_it_lives_and_not_longer(locking: str) -> None:
    """H4, with real processes: as in a TEE runtime without ``flock``, and in one that keeps its locks to itself."""
    with shmbroker.local_broker() as broker, worker_process(), running(sys.executable, "-c", LOCKLESS, locking) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"

        def segment() -> list[names.ObjectName]:
            return [one for one in objects(broker.instance) if one.kind == names.SEGMENT]

        assert run(sys.executable, "-m", "shmbroker", "gc", "--instance", broker.instance).returncode == 0
        time.sleep(2.5 * SWEEP_SECONDS)
        assert len(segment()) == 1
        assert client.poll() is None
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        wait_until(lambda: not segment())


# --- who is known -----------------------------------------------------------------------------------------------------------------------


def test_nobody_else_speaks_for_a_peer_that_lives(peers: Peers) -> None:
    me = names.new_id()
    peers.join(b"a", hello(me, this_process()))
    with pytest.raises(ValueError, match=f"{me} is somebody else, who lives"):
        peers.join(b"b", hello(me, this_process()))
    assert not peers.heard(b"b", me, STATS)
    peers.leave(b"b", me)
    (peer,) = peers.known()
    assert (peer.sender, peer.stats.calls) == (b"a", 0)
    assert peers.heard(b"a", me, STATS)
    assert peer.stats is STATS
    assert not peers.heard(b"a", names.new_id(), STATS), "nobody said Hello by that id"


def test_the_id_of_a_dead_process_may_be_taken_on_another_connection(peers: Peers, sitting: ForkProcess) -> None:
    peer = names.new_id()
    assert sitting.pid is not None
    peers.join(b"a", hello(peer, process_of(sitting.pid)))
    killed(sitting)
    peers.join(b"b", hello(peer, this_process()))
    assert [one.sender for one in peers.known()] == [b"b"]


def test_the_poller_wakes_when_a_peer_ends_and_the_others_are_told(
    peers: Peers, poller: zmq.Poller, sent: Sent, sitting: ForkProcess
) -> None:
    dying, other = names.new_id(), names.new_id()
    assert sitting.pid is not None
    peers.join(b"a", hello(dying, process_of(sitting.pid)))
    peers.join(b"b", hello(other, this_process()))
    assert not poller.poll(0)
    killed(sitting)
    assert poller.poll(10_000)
    peers.look_after()
    assert sent == [(b"b", m.PeerGone(dying)), (b"a", m.PeerGone(dying))], "itself too, in case that it lives"
    assert [peer.hello.peer for peer in peers.known()] == [other]
    assert not poller.poll(0), "nobody is watched who is gone"


ELSEWHERE = m.ProcessId(os.getpid(), 1, namespace=1)
"""A process of another pid namespace."""


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("hung_up", [True, False])
def test_a_peer_that_can_be_watched_in_no_way_is_gone_when_it_is_silent_and_its_connection_closed(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, closed: set[bytes], silent: bool, hung_up: bool
) -> None:
    """H4: the kernel closes a connection at its process's end; silence alone is no news."""
    peer = names.new_id()
    peers.join(b"a", hello(peer, ELSEWHERE))
    if silent:
        monkeypatch.setattr(peers_module, "SILENT_SECONDS", 0.0)
    if hung_up:
        closed.add(b"a")
    peers.look_after()
    assert bool(peers.known()) != (silent and hung_up)


@pytest.mark.parametrize("named", [True, False], ids=["with its name", "whose name was taken away"])
def test_a_peer_of_another_namespace_lives_as_long_as_it_holds_its_doorbell(
    peers: Peers, instance: str, monkeypatch: pytest.MonkeyPatch, closed: set[bytes], sent: Sent, named: bool
) -> None:
    """H5: however long it is silent, and whatever becomes of names and connections."""
    monkeypatch.setattr(peers_module, "SILENT_SECONDS", 0.0)
    peer = names.new_id()
    path = names.bell_path(names.bell_name(instance, peer))
    Path(path).touch()
    hold = Hold.on(path)
    peers.join(b"a", hello(peer, ELSEWHERE))
    if not named:
        os.unlink(path)
    closed.add(b"a")
    peers.look_after()
    assert [one.hello.peer for one in peers.known()] == [peer]
    assert not sent
    hold.release()
    peers.look_after()
    assert not peers.known()
    assert not os.path.exists(path)
    assert sent == [(b"a", m.PeerGone(peer))], "were it wrong, it would say Hello again"


def test_a_process_that_lost_its_connection_comes_back_on_another_and_nobody_else_does(peers: Peers, closed: set[bytes]) -> None:
    peer = names.new_id()
    peers.join(b"a", hello(peer, this_process()))
    closed.add(b"a")
    with pytest.raises(ValueError, match=f"{peer} is somebody else, who lives"):
        peers.join(b"b", hello(peer, ELSEWHERE))
    peers.join(b"b", hello(peer, this_process()))
    assert peers.heard(b"b", peer, STATS)


def test_the_broker_holds_what_was_made_anew_for_a_known_process_that_cannot_lock(
    peers: Peers, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H4."""
    owner = names.new_id()
    peers.join(b"a", hello(owner, this_process(), names.segment_name(instance, owner)))
    peers.hold_until_hello(owner, this_process(), made(instance, owner))
    monkeypatch.setattr(peers_module, "HANDOVER_SECONDS", 0.0)
    peers.look_after()
    assert is_held(path_of(instance, owner))


def test_the_socket_of_a_worker_that_listens_is_left_although_nothing_of_it_has_a_name_in_shared_memory(
    peers: Peers, instance: str, short_folder: Path
) -> None:
    """As after a logout, with a broker that was started anew and does not know it yet."""
    path = short_folder / f"{instance}.worker.{names.new_id()}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        peers.reap("held by nobody")
        assert path.exists()
    peers.reap("held by nobody")
    assert not path.exists()


def test_sockets_of_workers_that_are_no_more_are_taken_away(peers: Peers, instance: str, short_folder: Path) -> None:
    living, dead = names.new_id(), names.new_id()
    hold = made(instance, living)
    sockets = {peer: short_folder / f"{instance}.control.{peer}.sock" for peer in (living, dead)}
    foreign = short_folder / f"other-{instance}.control.{dead}.sock"
    for path in (*sockets.values(), foreign):
        path.touch()
    peers.reap("held by nobody")
    assert [sockets[living].exists(), sockets[dead].exists(), foreign.exists()] == [True, False, True]
    hold.release()


def test_the_sweep_takes_what_nobody_announced_once_in_its_time(peers: Peers, instance: str) -> None:
    def orphan() -> Callable[[], bool]:
        owner = names.new_id()
        made(instance, owner).release()
        return lambda: os.path.exists(path_of(instance, owner))

    first = orphan()
    peers.look_after()
    assert not first()
    second = orphan()
    peers.look_after()
    assert second(), "the next sweep is a second away"
