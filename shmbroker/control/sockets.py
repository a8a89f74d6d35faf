"""The sockets that carry control messages: one that asks, one that answers."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from shmbroker import errors
from shmbroker.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    AnyMessage,
    Done,
    Message,
    OutdatedPeer,
    Refused,
    encode,
    open_envelope,
    read_body,
)
from shmbroker.control.outdated import sender_of
from shmbroker.errors import ChannelError, PeerRefused, ProtocolMismatch, ShmBrokerError
from shmbroker.memory.open_files import telling_exhaustion

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=Message)

DEFAULT_REQUEST_SECONDS = 10.0
"""How long a request may take; a bind may load something, everything else takes a millisecond."""


ALIVE_SECONDS = 0.1
"""How often whoever waits for an answer looks whether the peer lives."""

_MESSAGES_AT_ONCE = 256
"""Answered before whoever answers looks after anything else: a peer that never stops asking must not keep it from that."""

_ERROR_CHARACTERS = 4096
"""Of an error's text in an answer, which may quote the request."""


class Requester:
    """Asks one peer, one request at a time. Used by one thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.endpoint = endpoint
        self._context = context
        self._numbers = itertools.count(1)
        self._socket = self._connect()

    def _connect(self) -> zmq.Socket[bytes]:
        with telling_exhaustion(f"asking {self.endpoint}"):
            socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ChannelError(f"{self.endpoint!r} is no endpoint that can be connected to: {error}") from None
        return socket

    def ask(
        self,
        message: Message,
        answer: type[Answer] | tuple[type[Answer], ...],
        timeout: float = DEFAULT_REQUEST_SECONDS,
        alive: Callable[[], bool] = lambda: True,
    ) -> Answer:
        """Send ``message`` and wait for its answer, ``timeout`` seconds at most, and no longer than the peer is ``alive()``.

        Raises TimeoutError when none comes, :class:`PeerRefused` with the peer's error, :class:`ProtocolMismatch`.
        """
        if self._socket.closed:  # for want of a file, when it was last to be made anew
            self._socket = self._connect()
        number = next(self._numbers)
        self._socket.send(encode(message, number))
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            if not self._socket.poll(max(1, int(min(left, ALIVE_SECONDS) * 1000))):
                if alive():
                    continue
                break
            try:
                envelope = open_envelope(self._socket.recv())
                if envelope.request != number:
                    continue  # the answer to a request that was given up
                body = read_body(envelope)
            except ValueError as error:
                log.warning("%s sent something else than a control message: %s", self.endpoint, error)
                continue
            if isinstance(body, Refused):
                raise error_named(body)
            if isinstance(body, answer):
                return body
            raise ProtocolMismatch(f"{self.endpoint} answered {type(message).__name__} with {type(body).__name__}")
        # A message that waits in a dead peer's pipe must not reach the next one that binds the endpoint.
        self._socket.close()
        self._socket = self._connect()
        waited = timeout - max(0.0, until - time.monotonic())
        raise TimeoutError(f"{self.endpoint} did not answer {type(message).__name__} within {waited:.1f} s")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def error_named(refused: Refused) -> ShmBrokerError:
    """The error that the peer raised, where it is one of ours; else :class:`PeerRefused` with its type and text."""
    kind = getattr(errors, refused.type_name, None)
    if isinstance(kind, type) and issubclass(kind, ShmBrokerError):
        return kind(refused.text)
    return PeerRefused(f"{refused.type_name}: {refused.text}")


def _refusal(error: BaseException) -> Refused:
    """The error as an answer, also one that cannot tell its text, tells too much, or tells what UTF-8 has no bytes for."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be told)"
    return Refused(type(error).__name__, text[:_ERROR_CHARACTERS].encode("utf-8", "replace").decode())


Handle = Callable[[bytes, AnyMessage], Message | None]
"""``handle(sender, message)`` returns the answer."""

MeetOutdated = Callable[[OutdatedPeer], bool]
"""Told who speaks another version; returns whether that one is to hear so, where it has not asked and may not listen."""


def meet_nobody(peer: OutdatedPeer) -> bool:
    """Of one that keeps no account of them: each hears so."""
    return True


def answer_to(
    handle: Handle, sender: bytes, data: bytes, meet_outdated: MeetOutdated = meet_nobody, pid: int = 0
) -> tuple[Message | None, int]:
    """What ``handle`` answers to ``data``, or its error as Refused, and the number of the request. ``pid``: of the sender, 0 where nothing tells it."""
    request = 0
    try:
        envelope = open_envelope(data)
        request = envelope.request
        if envelope.version != PROTOCOL_VERSION and not meet_outdated(sender_of(envelope, pid)) and not request:
            return None, request  # it was told before
        return handle(sender, read_body(envelope)), request
    except (ShmBrokerError, ValueError) as error:
        return _refusal(error), request
    except BaseException as error:  # a peer's odd request must not end the thread that serves the others, nor an op's SystemExit
        log.exception("control request failed")
        return _refusal(error), request


class Responder:
    """Answers whoever asks, through libzmq. Used by one thread. On unix sockets :class:`UnixResponder` is to be used."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        meet_outdated: MeetOutdated = meet_nobody,
    ) -> None:
        self._meet_outdated = meet_outdated
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 100)  # milliseconds: the last answer of a process that ends still goes out
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error for a message to nobody
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """As others are told it: with the port that the kernel chose."""

    @property
    def pollable(self) -> zmq.Socket[bytes]:
        """Readable when :meth:`answer_waiting` has something to do."""
        return self.socket

    def wait(self, seconds: float) -> None:
        """Block until there is something to do, for ``seconds`` at most."""
        self.socket.poll(int(seconds * 1000))

    def connected(self, receiver: bytes) -> bool:
        """Whether that connection is still open: the kernel closes it when its process ends."""
        try:
            self.socket.send_multipart([receiver, encode(Done())], zmq.NOBLOCK)  # which says nothing to anybody
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        return True

    def user_of(self, receiver: bytes) -> int | None:
        """Not known: whoever has the keys may connect from anywhere."""
        return None

    def make_room(self, files: int) -> None:
        """Nothing: libzmq does not tell who has said nothing."""

    def answer_waiting(self, handle: Handle) -> None:
        """Hand messages that have come to ``handle(sender, message)`` and send back what it returns, or its error as Refused."""
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) != 2:
                continue
            reply, request = answer_to(handle, parts[0], parts[1], self._meet_outdated)
            if reply is not None:
                self.send(parts[0], reply, request)

    def send(self, receiver: bytes, message: Message, request: int = 0) -> None:
        """Send a message to a peer that has written before; dropped when it is gone."""
        try:
            self.socket.send_multipart([receiver, encode(message, request)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("a message was dropped: %s", error)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
