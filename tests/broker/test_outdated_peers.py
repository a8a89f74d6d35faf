"""After an upgrade: who still speaks the version of before is named, once in the log, and by status and doctor while it lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from shmbroker.broker.outdated_peers import MOST_KEPT, OutdatedPeers
from shmbroker.control import messages as m
from shmbroker.control.broker_link import BrokerLink
from shmbroker.control.endpoint import ipc_endpoint
from shmbroker.control.liveness import this_process
from shmbroker.control.messages import OutdatedPeer
from shmbroker.control.outdated import in_words, sender_of
from shmbroker.control.unix_responder import UnixResponder
from shmbroker.errors import PeerRefused, ProtocolMismatch
from tests.conftest import StartChild
from tests.processes import run, running, wait_until

BEFORE = m.PROTOCOL_VERSION - 1

OF_BEFORE = "import sys; from shmbroker.control import messages, outdated, sockets; messages.PROTOCOL_VERSION = sockets.PROTOCOL_VERSION = {version}; "
"""Makes a process speak another version from then on."""

BROKER = OF_BEFORE + "from shmbroker.commands.cli import main; sys.argv[1:] = ['serve']; main()"
WORKER = OF_BEFORE + "import shmbroker; worker = shmbroker.Worker('old'); worker.op(abs); worker.serve(lambda: print('ready', flush=True))"


def started(code: str, version: int = BEFORE) -> tuple[str, str, str]:
    return sys.executable, "-c", code.format(version=version)


def await_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


@pytest.fixture
def folder(short_folder: Path, instance: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    short_folder.chmod(0o700)
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder))
    monkeypatch.setenv("SHMBROKER_INSTANCE", instance)
    monkeypatch.setenv("SHMBROKER_CONTROL", "ipc")
    return short_folder


def test_a_worker_that_is_older_than_its_broker_is_named_until_it_is_restarted(folder: Path) -> None:
    def command(*words: str) -> str:
        return run(sys.executable, "-m", "shmbroker", *words).stdout

    said = folder / "worker.err"
    with running(*started(BROKER)) as before:
        await_ready(before)
        with said.open("wb") as stderr:
            worker = subprocess.Popen(started(WORKER), stdout=subprocess.PIPE, stderr=stderr)
        await_ready(worker)
    log = folder / "broker.err"
    with log.open("wb") as stderr:
        broker = subprocess.Popen((sys.executable, "-m", "shmbroker", "serve"), stdout=subprocess.PIPE, stderr=stderr)
    try:
        await_ready(broker)
        line = f"worker pid {worker.pid} speaks version {BEFORE}: restart it"
        wait_until(lambda: line in log.read_text())
        assert line in command("status")
        assert f"warn worker: {line}" in command("doctor")
        (told,) = json.loads(command("status", "--json"))["outdated"]
        assert (told["role"], told["pid"], told["version"]) == ("worker", worker.pid, BEFORE)
        wait_until(lambda: "until this process is restarted: the peer speaks version" in said.read_text())
        worker.terminate()
        assert worker.wait(300) == 0
        wait_until(lambda: json.loads(command("status", "--json"))["outdated"] == [])
        assert log.read_text().count("restart it") == 1
        assert said.read_text().count("not known to the broker any more") == 1
    finally:
        for process in (worker, broker):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.term()


def of_version(version: int, message: m.Message, request: int = 0) -> bytes:
    envelope = m.open_envelope(m.encode(message, request))
    return msgspec.msgpack.encode(m.Envelope(version, request, envelope.body))


def test_who_asks_in_another_version_is_answered_and_who_only_tells_is_answered_once(
    context: zmq.Context[zmq.Socket[bytes]], short_folder: Path, instance: str
) -> None:
    outdated = OutdatedPeers(instance, short_folder)
    responder = UnixResponder(short_folder / "x.sock", outdated.meet)
    dealer = context.socket(zmq.DEALER)
    dealer.connect(responder.endpoint)
    beat = of_version(2, m.Heartbeat("0" * 16, m.PeerStats()))
    for message in (beat, beat, of_version(2, m.GetStatus(), 7), beat, of_version(2, m.MakeBell("0" * 16, this_process()), 8)):
        dealer.send(message)
    answers: list[int] = []
    while 8 not in answers:
        responder.wait(0.1)
        responder.answer_waiting(lambda sender, message: None)
        while dealer.poll(0):
            answers.append(m.open_envelope(dealer.recv()).request)
    assert answers == [0, 7, 8]
    (known,) = outdated.known()
    assert (known.pid, known.version) == (os.getpid(), 2), "by the socket, whatever the message says"
    dealer.close(0)
    responder.close()


def test_one_that_has_ended_is_told_of_no_more(
    tmp_path: Path, instance: str, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmbroker.broker.outdated_peers.LOOK_SECONDS", 0.0)
    outdated = OutdatedPeers(instance, tmp_path)
    child = start_child(int)
    child.join()
    gone, alive = (OutdatedPeer("client", "0" * 16, "", pid or 0, 2) for pid in (child.pid, os.getpid()))
    assert outdated.meet(gone)
    assert outdated.meet(alive)
    assert not outdated.meet(alive)
    outdated.look_after()
    assert outdated.known() == (alive,)


def test_who_makes_up_ever_new_ones_fills_no_memory(tmp_path: Path, instance: str) -> None:
    outdated = OutdatedPeers(instance, tmp_path)
    for number in range(2 * MOST_KEPT):
        outdated.meet(OutdatedPeer("client", f"{number:016x}", "", 0, 2))
    assert len(outdated.known()) == MOST_KEPT


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x81\xa4peer\x01", b"\x81\xa4name\xa2a\n", b"\x92\x01\x02"])
def test_whatever_a_message_of_another_version_holds_its_sender_is_told_without_an_error(body: bytes) -> None:
    told = sender_of(m.Envelope(9, 0, msgspec.Raw(body)))
    assert told == OutdatedPeer("", "", "", 0, 9)


def test_a_newer_peer_asks_for_a_newer_broker() -> None:
    told = in_words(OutdatedPeer("worker", "0" * 16, "", 4711, m.PROTOCOL_VERSION + 1))
    assert told.startswith(f"worker pid 4711 speaks version {m.PROTOCOL_VERSION + 1} ")
    assert "restart the broker with its release" in told


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (of_version(BEFORE, m.Welcome("1")), ProtocolMismatch, f"speaks version {BEFORE} of the control protocol"),
        (m.encode(m.Refused("ValueError", "names are of printable characters")), PeerRefused, "names are of printable characters"),
    ],
    ids=["another version", "refused"],
)
def test_a_hello_that_is_not_taken_is_told_as_what_it_is(
    context: zmq.Context[zmq.Socket[bytes]], short_folder: Path, answer: bytes, error: type[Exception], text: str, start_child: StartChild
) -> None:
    """It was told as a broker that does not answer."""
    endpoint = ipc_endpoint(short_folder / "x.sock")

    def refuse() -> None:
        router = zmq.Context().socket(zmq.ROUTER)
        router.bind(endpoint)
        while True:
            sender, _ = router.recv_multipart()
            router.send_multipart([sender, answer])

    start_child(refuse)
    hello = m.Hello("worker", "0" * 16, this_process(), "x", "0")
    link = BrokerLink(context, endpoint, lambda: hello, m.PeerStats, lambda peer: None)
    with pytest.raises(error, match=text):
        link.start()
