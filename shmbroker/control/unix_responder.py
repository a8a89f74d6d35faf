"""Answering control requests on a unix socket, also where no file can be opened any more.

libzmq ends the process when it accepts a connection there and the process may open no more files (``ipc_listener.cpp``, release 4.3.5): whoever can
reach the socket could end the broker by connecting often enough. So connections are accepted here, and the few lines of ZMTP that whoever answers needs
are in :mod:`shmbroker.control.zmtp`. Those who connect use libzmq.

U1  The last RESERVED_FILES files of the process are for refusals: whoever is connected on one of them is told why, and served as soon as there are more.
U2  A connection that has said nothing makes room for one that comes later.
U3  Whoever is connected stays so until it closes, dies, or breaks the rules.
U4  The socket has its name for as long as it listens: where that was taken away, another socket is bound to it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import zmq

from shmbroker.control import zmtp
from shmbroker.control.endpoint import ipc_endpoint
from shmbroker.control.messages import MAX_MESSAGE_BYTES, AnyMessage, GetStatus, Message, encode
from shmbroker.control.sockets import Handle, MeetOutdated, Responder, answer_to, meet_nobody
from shmbroker.errors import TooManyOpenFiles
from shmbroker.memory.open_files import file_limit, is_exhaustion, open_files

log = logging.getLogger(__name__)

RESERVED_FILES = 16
"""U1. Each refusal takes one, and looking after shared memory two or three for a moment."""

LAST_WORDS_SECONDS = 0.1
"""For the answers of a process that ends to go out."""

NAME_SECONDS = 1.0
"""How often it is looked whether the socket has its name (U4)."""

_BACKLOG = 128
_ACCEPTED_AT_ONCE = 64
_READ_BYTES = 1 << 16
MOST_WAITING_BYTES = 4 * MAX_MESSAGE_BYTES
"""Of answers that a peer does not read: what comes then is dropped."""

_PEER_CREDENTIALS = struct.Struct("3i")
"""``struct ucred`` of SO_PEERCRED (unix(7)): process, user, group; process 0 where it is none of this pid namespace."""


_OVERFLOW_USER = 65534
"""Whom the kernel tells for a user of another user namespace (``/proc/sys/kernel/overflowuid``)."""


def _pid_of(connected: socket.socket) -> int:
    """Of whoever connected, whatever it says itself."""
    pid: int = _PEER_CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size))[0]
    return pid


def _listening(path: Path) -> socket.socket:
    """A socket that listens at ``path``. Raises OSError, leaving nothing open."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class _Connection:
    """One peer's. ``name``: how the rest of the process names it."""

    __slots__ = ("crowded", "name", "reader", "socket", "waiting")

    def __init__(self, name: bytes, connected: socket.socket, crowded: bool) -> None:
        self.name = name
        self.socket = connected
        self.crowded = crowded
        """U1."""
        self.reader = zmtp.Reader(2 * MAX_MESSAGE_BYTES)
        self.waiting = bytearray(zmtp.GREETING + zmtp.READY)
        """To be sent."""


class UnixResponder:
    """Answers whoever asks on the unix socket ``path``, which it makes and whose maker removes it. Used by one thread."""

    def __init__(self, path: Path, meet_outdated: MeetOutdated = meet_nobody) -> None:
        """Raises OSError when the socket cannot be made."""
        self._meet_outdated = meet_outdated
        self.endpoint = ipc_endpoint(path)
        self._path = path
        self._next_look = 0.0
        self._numbers = itertools.count(1)
        self._connections: dict[int, _Connection] = {}
        """By descriptor, oldest first."""
        self._by_name: dict[bytes, _Connection] = {}
        with contextlib.ExitStack() as undo:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # of a process that died; the living keep others away by a lock, or have ids of their own
            self._listener = undo.enter_context(_listening(path))
            self._mode = stat.S_IMODE(path.stat().st_mode)
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, self._spare)
            self._epoll = undo.enter_context(select.epoll())
            self._epoll.register(self._listener, select.EPOLLIN)
            undo.pop_all()

    @property
    def pollable(self) -> int:
        """Readable when :meth:`answer_waiting` has something to do."""
        return self._epoll.fileno()

    def wait(self, seconds: float) -> None:
        """Block until there is something to do, for ``seconds`` at most."""
        self._epoll.poll(seconds, 1)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def waiting_bytes(self, receiver: bytes) -> int:
        """Of answers that this connection has not read yet."""
        connection = self._by_name.get(receiver)
        return 0 if connection is None else len(connection.waiting)

    def user_of(self, receiver: bytes) -> int | None:
        """The user that this peer ran as when it connected, as the kernel says; None where it is gone, or none of this user namespace."""
        connection = self._by_name.get(receiver)
        if connection is None:
            return None
        user: int = _PEER_CREDENTIALS.unpack(connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size))[1]
        return None if user == _OVERFLOW_USER else user

    def connected(self, receiver: bytes) -> bool:
        """Whether that connection is still open: the kernel closes it when its process ends."""
        return receiver in self._by_name

    # --- answering --------------------------------------------------------------------------------------------------------------------

    def answer_waiting(self, handle: Handle) -> None:
        """As :meth:`Responder.answer_waiting`: of each connection what one read gives, so that none keeps the others waiting."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + NAME_SECONDS
            self._ensure_named()
        for fd, events in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept_waiting()
                continue
            connection = self._connections.get(fd)
            if connection is not None and events & select.EPOLLOUT:
                self._flush(connection)
            if connection is not None and events & ~select.EPOLLOUT:
                self._read(connection, handle)

    def _read(self, connection: _Connection, handle: Handle) -> None:
        try:
            data = connection.socket.recv(_READ_BYTES)
            if not data:
                self._close(connection)
                return
            for parts in connection.reader.messages(data):
                if len(parts) == 1:
                    reply, request = answer_to(
                        self._guarded(connection, handle), connection.name, parts[0], self._meet_outdated, _pid_of(connection.socket)
                    )
                    if reply is not None:
                        self.send(connection.name, reply, request)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            log.debug("a connection was closed: %s", error)
            self._close(connection)

    @staticmethod
    def _guarded(connection: _Connection, handle: Handle) -> Handle:
        """``handle``, but for whoever is connected on one of the last files (U1). How it stands is told to everybody."""

        def guarded(sender: bytes, message: AnyMessage) -> Message | None:
            connection.crowded = connection.crowded and open_files() > file_limit() - RESERVED_FILES
            if connection.crowded and not isinstance(message, GetStatus):
                raise no_files_left()
            return handle(sender, message)

        return guarded

    def send(self, receiver: bytes, message: Message, request: int = 0) -> None:
        """Send a message to a peer that is connected; dropped when it is not, or reads nothing."""
        connection = self._by_name.get(receiver)
        if connection is None or len(connection.waiting) > MOST_WAITING_BYTES:
            log.debug("a message was dropped: its receiver is gone, or does not read")
            return
        connection.waiting += zmtp.message(encode(message, request))
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        """Send what waits, and have the poller say when more can be sent."""
        waiting = connection.waiting
        try:
            while waiting:
                del waiting[: connection.socket.send(waiting, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            waiting.clear()  # the next read tells that it is closed
        with contextlib.suppress(OSError, ValueError):
            self._epoll.modify(connection.socket, select.EPOLLIN | (select.EPOLLOUT if waiting else 0))

    def _ensure_named(self) -> None:
        """U4."""
        if self._path.exists():
            return
        try:
            anew = _listening(self._path)
            self._path.chmod(self._mode)
        except OSError as error:
            log.warning("the name of socket %s was taken away and cannot be given again: %s", self._path, error)
            return
        log.warning("the name of socket %s was taken away: bound anew", self._path)
        self._accept_waiting()
        self._epoll.unregister(self._listener)
        self._listener.close()
        self._listener = anew
        self._epoll.register(anew, select.EPOLLIN)

    # --- connections ------------------------------------------------------------------------------------------------------------------

    def _accept_waiting(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not is_exhaustion(error):
                    log.debug("a connection was not accepted: %s", error)
                    return
                if not self._make_way():
                    self._turn_away()
                continue
            # The kernel gives the lowest number that is free: one so high says that all below are taken.
            crowded = accepted.fileno() >= file_limit() - RESERVED_FILES
            if crowded:
                crowded = not self._close_first(self._silent())
            accepted.setblocking(False)
            connection = _Connection(next(self._numbers).to_bytes(5, "big"), accepted, crowded)
            self._connections[accepted.fileno()] = self._by_name[connection.name] = connection
            self._epoll.register(accepted, select.EPOLLIN)
            self._flush(connection)

    def make_room(self, files: int) -> None:
        """Close connections that have said nothing until ``files`` can be opened besides the reserve, or none of them is left (U2)."""
        while open_files() + files > file_limit() - RESERVED_FILES and self._close_first(self._silent()):
            pass

    def _silent(self) -> Iterator[_Connection]:
        return (connection for connection in self._connections.values() if not connection.reader.spoke)

    def _make_way(self) -> bool:
        crowded = (connection for connection in self._connections.values() if connection.crowded)
        return self._close_first(itertools.chain(self._silent(), crowded))

    def _close_first(self, candidates: Iterator[_Connection]) -> bool:
        connection = next(candidates, None)
        if connection is not None:
            self._close(connection)
        return connection is not None

    def _turn_away(self) -> None:
        """Accept with the file that is spared for it, and hang up: else the one that waits would be waited for without end."""
        os.close(self._spare)
        try:
            with contextlib.suppress(OSError):
                self._listener.accept()[0].close()
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()], self._by_name[connection.name]
        connection.socket.close()

    def close(self) -> None:
        """Send what waits, for LAST_WORDS_SECONDS at most, and close all."""
        until = time.monotonic() + LAST_WORDS_SECONDS
        while time.monotonic() < until and any(connection.waiting for connection in self._connections.values()):
            for connection in list(self._connections.values()):
                self._flush(connection)
            time.sleep(0.001)
        for connection in list(self._connections.values()):
            self._close(connection)
        self._epoll.close()
        self._listener.close()
        os.close(self._spare)


def no_files_left() -> TooManyOpenFiles:
    """What a process that serves others says when it keeps the files that it has left for saying so."""
    return TooManyOpenFiles(
        f"process {os.getpid()}, which was asked, keeps the last of its {file_limit()} open files and takes nobody more: close other clients, or "
        "start it with a larger limit (ulimit -n; systemd: LimitNOFILE=; docker run --ulimit nofile=)"
    )


def require_room(responder: AnyResponder, files: int) -> None:
    """Raise :class:`TooManyOpenFiles` unless ``files`` can be opened besides the reserve; who has said nothing is hung up on for it (U1, U2)."""
    responder.make_room(files)
    if open_files() + files > file_limit() - RESERVED_FILES:
        raise no_files_left()


AnyResponder = Responder | UnixResponder


def responder_at(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, meet_outdated: MeetOutdated = meet_nobody) -> AnyResponder:
    """Answers at ``endpoint``: a unix socket, or loopback TCP, where libzmq lives through having no file left."""
    transport, _, where = endpoint.partition("://")
    return UnixResponder(Path(where), meet_outdated) if transport == "ipc" else Responder(context, endpoint, meet_outdated)
