"""Control over loopback TCP with CURVE keys: who has the folder takes part, nobody else gets a word through. With real processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zmq

import shmbroker
from shmbroker.control import messages as m
from shmbroker.control.access import Access, loopback_endpoint
from shmbroker.control.curve import ANY_PORT, CurveContext
from shmbroker.control.endpoint import may_listen
from shmbroker.control.keys import Keys, make_keys
from shmbroker.control.sockets import Requester, Responder
from shmbroker.control.status import ask
from shmbroker.lane.zmq_lane import COMPLETE, READY
from tests.conftest import INSTANCE_PREFIX
from tests.processes import broker_process, run, wait_until, worker_process

INSTANCE = f"{INSTANCE_PREFIX}tcp"
SILENCE_MS = 300
"""After so long without an answer there is none: a member's comes within 10 ms."""


@dataclass(frozen=True)
class World:
    endpoint: str
    keys: Path
    broker_pid: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(pid: int) -> list[str]:
    """Where a process takes TCP connections."""
    links = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.add(os.readlink(path))
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in links:
                address, port = local.split(":")
                words = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
                found.append(f"tcp://{socket.inet_ntop(family, words)}:{int(port, 16)}")
    return found


def control_endpoint(service: str = "test") -> str:
    """Where the worker that offers the service takes control requests, as the broker tells its clients."""
    access = Access.of(INSTANCE)
    with access.context() as context:
        requester = Requester(context, access.endpoint)
        (worker,) = requester.ask(m.FindService(service), m.Found).workers
        requester.close()
    return worker.endpoint


def make(folder: Path) -> Path:
    done = run(sys.executable, "-m", "shmbroker", "keys", "--make", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Keys, broker and worker, made by the commands; the environment of this process points to them."""
    folder = tmp_path_factory.mktemp("tcp")
    keys = make(folder / "keys")
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with pytest.MonkeyPatch.context() as environment:
        # A folder too long for unix sockets: none is needed. The broker's lock lies in it.
        environment.setenv("SHMBROKER_RUNTIME_DIR", str(folder / ("long" * 30)))
        environment.setenv("SHMBROKER_INSTANCE", INSTANCE)
        environment.delenv("SHMBROKER_CONTROL", raising=False)
        with broker_process(INSTANCE, "--control", endpoint, "--keys", str(keys)) as broker:
            environment.setenv("SHMBROKER_CONTROL", endpoint)
            environment.setenv("SHMBROKER_KEYS", str(keys))
            with worker_process():
                yield World(endpoint, keys, broker.pid)


@pytest.fixture
def client(world: World) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="1M", channels=4, depth=4) as client:
        yield client


@pytest.mark.parametrize(("lane", "doorbell"), [("shm", "sem"), ("shm", "poll"), ("zmq", "auto")])
def test_calls_run_on_every_lane_with_control_over_tcp_and_reports_say_so(client: shmbroker.Client, lane: str, doorbell: str) -> None:
    channel = client.channel("test", lane=lane, doorbell=doorbell)
    double = channel.bind("double")
    x = client.empty((1000,)).fill_(21.0)
    assert all(torch.equal(double(x), x * 2) for _ in range(20))
    assert channel.lane == lane
    assert channel.report().control == "tcp"
    assert (channel.report().socket_bytes > 0) == (lane == "zmq"), "tensors and, on lane shm, frames go through memory"


def test_status_tells_tcp_of_every_channel_and_only_loopback_is_listened_on(world: World, client: shmbroker.Client) -> None:
    channels = [client.channel("test", lane="shm"), client.channel("test", lane="zmq")]
    wait_until(lambda: any(len(peer.stats.channels) == 2 for peer in ask(None).peers), 10.0)
    report = ask(None)
    assert report.endpoint == world.endpoint
    assert [c.control for peer in report.peers for c in peer.stats.channels] == ["tcp", "tcp"]
    assert re.search(r"zmq +socket +tcp", run(sys.executable, "-m", "shmbroker", "status").stdout)
    assert [channel.lane for channel in channels] == ["shm", "zmq"]
    (worker,) = [peer for peer in report.peers if peer.role == "worker"]
    listened_on = {pid: listening(pid) for pid in (world.broker_pid, worker.pid)}
    assert listened_on[world.broker_pid] == [world.endpoint]
    assert len(listened_on[worker.pid]) == 2, "for control and for lane zmq"
    assert all(re.fullmatch(r"tcp://127\.0\.0\.1:\d+", endpoint) for endpoint in listened_on[worker.pid])


def test_calls_go_on_without_the_broker_and_everyone_is_known_to_the_next_one(world: World, tmp_path: Path) -> None:
    instance, endpoint = f"{INSTANCE}-two", f"tcp://127.0.0.1:{free_port()}"
    environment = {"SHMBROKER_CONTROL": endpoint, "SHMBROKER_INSTANCE": instance}
    with pytest.MonkeyPatch.context() as change, broker_process(instance, **environment) as first:
        for name, value in environment.items():
            change.setenv(name, value)
        with worker_process(), shmbroker.connect(arena="1M") as client:
            double = client.channel("test").bind("double")
            first.kill()
            first.wait()
            assert double(torch.ones(2)).tolist() == [2.0, 2.0]
            with broker_process(instance):
                wait_until(lambda: sorted(peer.role for peer in ask(None).peers) == ["client", "worker"], 10.0)


# --- who is let in ----------------------------------------------------------------------------------------------------------------------


def strangers(keys: Keys) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Socket options of those who must not be heard."""
    public, secret = zmq.curve_keypair()
    yield "no keys at all", {}
    yield "a key of his own", {zmq.CURVE_SERVERKEY: keys.server.public, zmq.CURVE_PUBLICKEY: public, zmq.CURVE_SECRETKEY: secret}
    yield (
        "the member's public key alone",
        {zmq.CURVE_SERVERKEY: keys.server.public, zmq.CURVE_PUBLICKEY: keys.member.public, zmq.CURVE_SECRETKEY: secret},
    )


def test_nobody_without_the_members_key_gets_a_word_through(world: World, client: shmbroker.Client) -> None:
    keys = Keys.load(world.keys)
    channel = client.channel("test", lane="zmq")
    targets = {
        "broker": (world.endpoint, m.encode(m.GetStatus(), 1), b"x"),
        "worker": (channel.endpoint, m.encode(m.CloseChannel(channel.opened.channel), 1), b"x"),
        "lane": (channel.opened.endpoint, READY, COMPLETE + b"x"),
    }
    member = {zmq.CURVE_SERVERKEY: keys.server.public, zmq.CURVE_PUBLICKEY: keys.member.public, zmq.CURVE_SECRETKEY: keys.member.secret}
    with zmq.Context() as context:
        sockets: dict[zmq.Socket[bytes], str] = {}
        for who, options in [*strangers(keys), ("a member", member)]:
            for target, (endpoint, message, identity) in targets.items():
                raw = context.socket(zmq.DEALER)
                raw.setsockopt(zmq.LINGER, 0)
                raw.setsockopt(zmq.IDENTITY, identity)
                for option, value in options.items():
                    raw.setsockopt(option, value)
                raw.connect(endpoint)
                # A member's word would close the channel: it asks for one that is not there.
                raw.send(m.encode(m.CloseChannel(0), 1) if (who, target) == ("a member", "worker") else message)
                sockets[raw] = f"{who} at the {target}"
        poller = zmq.Poller()
        for raw in sockets:
            poller.register(raw, zmq.POLLIN)
        answered: set[str] = set()
        of_members = {f"a member at the {target}" for target in targets}

        def listen() -> bool:
            for raw, _ in poller.poll(SILENCE_MS):
                answered.add(sockets[raw])
                raw.recv()
            return answered >= of_members

        wait_until(listen, 10.0)
        listen()
        for raw in sockets:
            raw.close()
    assert answered == of_members, "the same words of a member are answered"
    assert channel.bind("double")(torch.ones(1)).item() == 2.0


def test_a_member_does_not_talk_to_a_server_without_the_servers_key(world: World, tmp_path: Path) -> None:
    """An impostor that has got hold of the port."""
    make_keys(tmp_path / "other")
    mine, others = Keys.load(world.keys), Keys.load(tmp_path / "other")
    context, impostor = CurveContext(mine), CurveContext(others)
    responder = Responder(impostor, ANY_PORT)
    requester = Requester(context, responder.endpoint)
    try:
        with pytest.raises(TimeoutError):
            requester.ask(m.GetStatus(), m.StatusReport, SILENCE_MS / 1000)
        assert not responder.socket.poll(0)
    finally:
        for closing in (requester.close, responder.close, context.term, impostor.term):
            closing()


def test_a_client_with_other_keys_is_told_that_keys_are_the_likely_cause(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path / "other")
    monkeypatch.setenv("SHMBROKER_KEYS", str(tmp_path / "other"))
    with pytest.raises(shmbroker.BrokerUnreachable, match=r"most likely its keys are others .*SHMBROKER_KEYS must name the folder"):
        shmbroker.connect(arena="1M")


def test_without_keys_tcp_is_refused_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMBROKER_KEYS")
    for join in (lambda: shmbroker.connect(arena="1M"), lambda: shmbroker.Worker("x").serve(), lambda: ask(None)):
        with pytest.raises(shmbroker.BadInput, match=r"needs keys: make them with 'shmbroker keys --make DIR'"):
            join()
    done = run(sys.executable, "-m", "shmbroker", "serve", "--control", world.endpoint)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "needs keys" in done.stderr


def test_no_broker_at_the_port_is_told_with_the_command_that_starts_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    monkeypatch.setenv("SHMBROKER_CONTROL", endpoint)
    with pytest.raises(shmbroker.BrokerUnreachable, match=rf"shmbroker serve --instance {INSTANCE} --control {endpoint} --keys DIR"):
        shmbroker.connect(arena="1M")


def test_a_port_that_is_taken_is_told(world: World) -> None:
    done = run(sys.executable, "-m", "shmbroker", "serve", "--instance", f"{INSTANCE}-late", "--control", world.endpoint)
    assert done.returncode == 1
    assert f"cannot listen on {world.endpoint}: Address already in use; choose another --control" in done.stderr


def test_a_private_broker_keeps_to_unix_sockets_whatever_the_environment_says(world: World) -> None:
    with shmbroker.local_broker() as private, shmbroker.connect(arena="1M"):
        assert ask(None).endpoint.startswith("ipc://")
        assert ask(None).instance == private.instance
    assert ask(None).endpoint == world.endpoint


# --- addresses --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("tcp://0.0.0.0:5555", "0.0.0.0, which is not a loopback address"),
        ("tcp://*:5555", "would listen to the network"),
        ("tcp://192.0.2.1:5555", "192.0.2.1, which is not a loopback address"),
        ("tcp://[::]:5555", "::, which is not a loopback address"),
        ("tcp://[2001:db8::1]:5555", "which is not a loopback address"),
        ("tcp://no.such.host.invalid:5555", "cannot be resolved"),
        ("tcp://127.0.0.1:*", "has no port"),
        ("tcp://127.0.0.1:0", "has no port"),
        ("tcp://127.0.0.1:65536", "has no port"),
        ("tcp://127.0.0.1", "cannot be read"),
        ("tcp://127.0.0.1:80/x", "cannot be read"),
        ("udp://127.0.0.1:5555", "cannot be read"),
        ("ipc:///tmp/x.sock", "cannot be read"),
    ],
)
def test_addresses_that_are_not_loopback_with_a_port_are_refused(address: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(shmbroker.BadInput, match=re.escape(told)):
        Access.of("x", address, str(tmp_path))


def test_a_host_name_counts_by_all_that_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*numeric: str) -> None:
        found = [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 5555)) for one in numeric]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    resolve("::1", "127.0.0.1")
    assert loopback_endpoint("tcp://somewhere:5555") == "tcp://127.0.0.1:5555"
    resolve("::1")
    assert loopback_endpoint("tcp://somewhere:5555") == "tcp://[::1]:5555"
    resolve("127.0.0.1", "192.0.2.7")
    with pytest.raises(shmbroker.BadInput, match=r"means 192\.0\.2\.7"):
        loopback_endpoint("tcp://somewhere:5555")


def test_serve_refuses_what_is_not_loopback_in_one_line(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    done = run(
        *(sys.executable, "-m", "shmbroker", "serve", "--control", "tcp://0.0.0.0:5555", "--keys", str(tmp_path / "keys")),
        SHMBROKER_RUNTIME_DIR=str(tmp_path),
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "never listens to the network" in done.stderr
    with pytest.raises(shmbroker.BadInput, match="keys are for control over TCP"):
        Access.of("x", "ipc", str(tmp_path / "keys"))


@pytest.mark.parametrize("with_keys", [False, True])
def test_sockets_go_nowhere_else_whatever_a_peer_tells(tmp_path: Path, with_keys: bool) -> None:
    """Endpoints of workers come from the broker, those of lanes from workers."""
    make_keys(tmp_path / "keys")
    context = CurveContext(Keys.load(tmp_path / "keys") if with_keys else None)
    others = [f"ipc://{tmp_path}/s"] if with_keys else ["tcp://127.0.0.1:5555"]
    for endpoint in ["tcp://192.0.2.1:5555", "tcp://localhost:5555", "tcp://0.0.0.0:*", "tcp://*:*", "inproc://x", "", *others]:
        for kind in (Requester, Responder):
            with pytest.raises(shmbroker.BadInput, match="as this instance's sockets are"):
                kind(context, endpoint)
    context.term()  # would wait for a socket that was left open


def test_ipv6_loopback_works_too_where_there_is_any(tmp_path: Path) -> None:
    if not Path("/proc/net/if_inet6").exists() or "00000000000000000000000000000001" not in Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 loopback here")
    make_keys(tmp_path / "keys")
    context = CurveContext(Keys.load(tmp_path / "keys"))
    responder = Responder(context, "tcp://[::1]:*")
    requester = Requester(context, responder.endpoint)
    assert may_listen(responder.endpoint)
    answering = threading.Thread(
        target=lambda: responder.socket.poll(300_000) and responder.answer_waiting(lambda sender, message: m.Welcome("1"))
    )
    answering.start()
    assert requester.ask(m.GetStatus(), m.Welcome).epoch == "1"
    answering.join()
    requester.close()
    responder.close()
    context.term()
    assert not may_listen(responder.endpoint)
    assert not [thread for thread in threading.enumerate() if thread.name == "shmbroker-zap"], "the end of the context ends who guards it"


# --- keys -------------------------------------------------------------------------------------------------------------------------------


def test_keys_are_made_for_their_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = make(tmp_path / "a" / "keys")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"keys": 0o700, "server.key": 0o600, "server.key_secret": 0o600, "member.key": 0o600, "member.key_secret": 0o600}
    keys = Keys.load(folder)
    assert len({keys.server.public, keys.server.secret, keys.member.public, keys.member.secret}) == 4
    again = run(sys.executable, "-m", "shmbroker", "keys", "--make", str(folder))
    assert again.returncode == 1
    assert "exists and is not overwritten" in again.stderr
    assert Keys.load(folder) == keys


def test_keys_are_not_made_where_others_can_read(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(shmbroker.BadInput, match=r"is open to others \(mode 0755\): 'chmod go="):
        make_keys(tmp_path / "open")
    assert not list((tmp_path / "open").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(shmbroker.BadInput, match=r"keys cannot be made in .*file"):
        make_keys(tmp_path / "file")


@pytest.mark.parametrize("name", ["server", "member"])
def test_keys_that_cannot_be_used_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(shmbroker.BadInput, match="there are no keys at"):
        Keys.load(tmp_path / "nowhere")
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "other")
    secret = tmp_path / "keys" / f"{name}.key_secret"
    good = secret.read_text()
    other = (tmp_path / "other" / f"{name}.key_secret").read_text()
    wrong_half = good.replace(good.split('secret-key = "')[1], other.split('secret-key = "')[1])
    public_alone = (tmp_path / "keys" / f"{name}.key").read_text()
    for garbled in ("", "curve", good[:-5], good.upper(), wrong_half, public_alone, 'public-key = "x"\nsecret-key = "y"', "\0" * 100):
        secret.write_text(garbled)
        with pytest.raises(shmbroker.BadInput, match=rf"key file .*{name}\.key_secret holds no CURVE key pair"):
            Keys.load(tmp_path / "keys")
    secret.write_text(good)
    Keys.load(tmp_path / "keys")
    for path in (secret, tmp_path / "keys"):
        mode = path.stat().st_mode
        path.chmod(mode | 0o040)
        with pytest.raises(shmbroker.BadInput, match="is open to others"):
            Keys.load(tmp_path / "keys")
        path.chmod(mode)
    secret.unlink()
    with pytest.raises(shmbroker.BadInput, match="there are no keys at"):
        Keys.load(tmp_path / "keys")
    shutil.rmtree(tmp_path / "keys")
