"""Answering on a unix socket: libzmq at the other end, and whatever else connects. Invariants U1 to U3."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from shmbroker.control import messages as m
from shmbroker.control import zmtp
from shmbroker.control.sockets import Requester
from shmbroker.control.unix_responder import MOST_WAITING_BYTES, RESERVED_FILES, UnixResponder, require_room
from shmbroker.errors import TooManyOpenFiles
from shmbroker.memory.open_files import open_files
from tests.conftest import InChild
from tests.processes import wait_until

SECONDS = 120.0
BARE_CONNECTIONS = 300


class Answering:
    """A responder that turns in a thread of its own and answers with the name of the op that it is asked to bind."""

    def __init__(self, path: Path) -> None:
        self.responder = UnixResponder(path)
        self.context = zmq.Context()
        self.asked: list[str] = []
        self.senders: set[bytes] = set()
        self.do: Callable[[], None] | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop:
            self.responder.wait(0.05)
            self.responder.answer_waiting(self._answer)
            if self.do is not None:
                self.do()
                self.do = None

    def _answer(self, sender: bytes, message: m.AnyMessage) -> m.Message:
        self.senders.add(sender)
        if isinstance(message, m.GetStatus):
            return m.Done()
        assert isinstance(message, m.Bind)
        self.asked.append(message.op)
        return m.Made(message.op)

    def requester(self) -> Requester:
        return Requester(self.context, self.responder.endpoint)

    def in_its_thread(self, action: Callable[[], None]) -> None:
        self.do = action
        wait_until(lambda: self.do is None, SECONDS)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self.responder.close()
        self.context.term()


@pytest.fixture
def answering(short_folder: Path) -> Iterator[Answering]:
    answering = Answering(short_folder / "s")
    yield answering
    answering.close()


def echo(requester: Requester, text: str) -> str:
    return requester.ask(m.Bind(0, text, {}), m.Made, SECONDS).name


@contextlib.contextmanager
def connections(path: Path, count: int) -> Iterator[list[socket.socket]]:
    """Bare ones, which say nothing."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for _ in range(count)]
        for one in made:
            one.settimeout(SECONDS)
            one.connect(str(path))
        yield made


@pytest.mark.parametrize("length", [1, 200, 255, 256, 70_000, 900_000])
def test_messages_of_every_length_go_both_ways(answering: Answering, length: int) -> None:
    requester = answering.requester()
    for text in ("a" * length, "b", "c" * length):
        assert echo(requester, text) == text
    requester.close()


def test_a_message_that_comes_byte_by_byte_is_read_and_several_at_once_are_all_answered(answering: Answering, short_folder: Path) -> None:
    with connections(short_folder / "s", 1) as (bare,):
        for byte in zmtp.GREETING + zmtp.READY + zmtp.message(m.encode(m.Bind(0, "slow", {}), 1)):
            bare.sendall(bytes((byte,)))
        bare.sendall(b"".join(zmtp.message(m.encode(m.Bind(0, str(number), {}), number)) for number in range(100)))
        wait_until(lambda: len(answering.asked) == 101, SECONDS)
        assert answering.asked == ["slow", *map(str, range(100))]


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        zmtp.GREETING[:10] + b"\x01" + bytes(53),
        zmtp.GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32),
        zmtp.GREETING + b"\xff",
        zmtp.GREETING + zmtp.READY + b"\x02" + (1 << 40).to_bytes(8, "big"),
        zmtp.GREETING + zmtp.READY + b"\x03" + (1 << 21).to_bytes(8, "big") + b"x" * 4096,
        zmtp.GREETING + zmtp.READY + b"\x01\x00" * 1000,
    ],
    ids=["http", "version 1", "another mechanism", "half a frame", "a length without end", "too long", "frames without end"],
)
def test_what_is_no_zmtp_is_hung_up_on_or_waited_for_and_others_are_answered(
    answering: Answering, short_folder: Path, rubbish: bytes
) -> None:
    requester = answering.requester()
    with connections(short_folder / "s", 1) as (bare,):
        bare.sendall(rubbish)
        assert echo(requester, "others") == "others"
    requester.close()


def test_a_peer_that_reads_nothing_costs_so_much_memory_and_no_more(answering: Answering, short_folder: Path) -> None:
    with connections(short_folder / "s", 1) as (bare,):
        bare.sendall(zmtp.GREETING + zmtp.READY)
        for number in range(100):
            bare.sendall(zmtp.message(m.encode(m.Bind(0, "x" * 200_000, {}), number)))
        wait_until(lambda: len(answering.asked) == 100, SECONDS)
        (sender,) = answering.senders
        assert answering.responder.waiting_bytes(sender) <= MOST_WAITING_BYTES + 300_000
        requester = answering.requester()
        assert echo(requester, "others") == "others"
        requester.close()


def test_a_connection_is_known_to_be_closed_once_its_process_is_gone(answering: Answering) -> None:
    """U3."""
    requester = answering.requester()
    echo(requester, "hello")
    (sender,) = answering.senders
    assert answering.responder.connected(sender)
    requester.close()
    wait_until(lambda: not answering.responder.connected(sender), SECONDS)


CONNECTED = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
connected = socket.socket(socket.AF_UNIX)
connected.connect(sys.argv[1])
connected.sendall(bytes.fromhex(sys.argv[3]))
sys.stdin.read()
"""


@pytest.mark.parametrize("uid", [0, 1234, 65534])
def test_the_user_of_a_connection_is_the_kernels_word(answering: Answering, short_folder: Path, uid: int) -> None:
    """Which decides whose calls may be computed together. A user of another user namespace is nobody's, and so is whoever has gone."""
    if os.geteuid() not in (0, uid):
        pytest.skip("only root can be another user")
    short_folder.chmod(0o755)
    (short_folder / "s").chmod(0o666)
    asks = (zmtp.GREETING + zmtp.READY + zmtp.message(m.encode(m.Bind(1, "hello", {}), 1))).hex()
    process = subprocess.Popen([sys.executable, "-c", CONNECTED, str(short_folder / "s"), str(uid), asks], stdin=subprocess.PIPE)
    wait_until(lambda: bool(answering.senders), SECONDS)
    (sender,) = answering.senders
    assert answering.responder.user_of(sender) == (None if uid == 65534 else uid)
    process.communicate()
    wait_until(lambda: not answering.responder.connected(sender), SECONDS)
    assert answering.responder.user_of(sender) is None


def _limited(path: Path, free: int, work: Callable[[Answering], None]) -> Callable[[], None]:
    """``work`` in a process that may open ``free`` files more than it has open then."""

    def limited() -> None:
        answering = Answering(path)
        requester = answering.requester()
        echo(requester, "libzmq has what it needs")
        limit = open_files() + free
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        work(answering)
        assert echo(requester, "who was there before is served") == "who was there before is served"
        requester.close()
        answering.close()

    return limited


@pytest.mark.parametrize("free", [RESERVED_FILES + 20, RESERVED_FILES, 3])
def test_hundreds_of_connections_that_say_nothing_neither_end_the_process_nor_keep_others_out(
    in_child: InChild, short_folder: Path, free: int
) -> None:
    """U2: also where no file is left for any of them."""
    path = short_folder / "s"

    def work(answering: Answering) -> None:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # another process, whose files are its own
            try:
                os.close(read)
                resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
                _knock_often(path, write)
            finally:
                traceback.print_exc()
                os._exit(1)
        os.close(write)
        assert os.read(read, 1) == b"."
        os.close(read)
        _, status = os.waitpid(child, 0)
        assert status == 0

    in_child(_limited(path, free, work))


def _connected(path: Path) -> socket.socket:
    """Waits where connections that were not accepted yet are as many as may be; one with a timeout from the beginning would be refused there."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        one.connect(str(path))
    except OSError:
        one.close()
        raise
    one.settimeout(SECONDS)
    return one


def _knock_often(path: Path, write: int) -> None:
    """Many connections at a time, closed and made again as the process's own files allow; then a question, which is answered."""
    kept: list[socket.socket] = []
    for _ in range(BARE_CONNECTIONS):
        try:
            kept.append(_connected(path))
        except OSError:  # no file is left here
            kept.pop(0).close()
    kept.pop(0).close()
    one = _connected(path)
    one.sendall(zmtp.GREETING + zmtp.READY + zmtp.message(m.encode(m.GetStatus(), 1)))
    answer = b""
    while b"Done" not in answer:
        chunk = one.recv(4096)
        if not chunk:
            os._exit(1)
        answer += chunk
    os.write(write, b".")
    os._exit(0)


def test_whoever_is_connected_on_one_of_the_last_files_is_told_why_and_served_when_there_are_more(
    in_child: InChild, short_folder: Path
) -> None:
    """U1."""

    def work(answering: Answering) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(limit - open_files() - RESERVED_FILES + 3)]
        asking = answering.requester()
        with pytest.raises(TooManyOpenFiles, match=f"keeps the last of its {limit} open files and takes nobody more"):
            echo(asking, "now")
        assert asking.ask(m.GetStatus(), m.Done, SECONDS), "how it stands is told to everybody"
        for fd in kept:
            os.close(fd)
        assert echo(asking, "later") == "later"
        asking.close()

    in_child(_limited(short_folder / "s", RESERVED_FILES + 12, work))


def test_room_is_made_at_the_cost_of_those_who_have_said_nothing_and_of_nobody_else(in_child: InChild, short_folder: Path) -> None:
    """U1, U2."""
    path = short_folder / "s"

    def work(answering: Answering) -> None:
        told: list[BaseException] = []

        def require(files: int) -> Callable[[], None]:
            def action() -> None:
                try:
                    require_room(answering.responder, files)
                except TooManyOpenFiles as error:
                    told.append(error)

            return action

        with connections(path, 6):
            wait_until(lambda: answering.responder.connections == 7, SECONDS)
            answering.in_its_thread(require(20))
            assert not told
            assert 1 <= answering.responder.connections < 7
            answering.in_its_thread(require(60))
            assert len(told) == 1
            assert answering.responder.connections == 1, "who has spoken stays"

    in_child(_limited(path, RESERVED_FILES + 30, work))
