"""A socket to whoever answers control requests, which carries anything."""

from __future__ import annotations

from typing import Any

import zmq

import shmbroker
from shmbroker.control import messages as m
from shmbroker.control.liveness import this_process
from shmbroker.memory import names

ANSWER_MS = 20_000
"""How long an answer may take: many times what it does."""

MARK = 0xABCDEF
"""The number of the question that is asked behind each message."""


class Wire:
    """One connection, not bound to any rule."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._context = context
        self.endpoint = endpoint
        self._socket = self._connect()

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self.endpoint)
        return socket

    def send(self, message: bytes) -> None:
        """Send something, and wait for no answer."""
        self._socket.send(message)

    def say(self, *parts: bytes) -> list[m.AnyMessage]:
        """Send something; returns the answers to it. A question by the rules is sent behind it: what came before its answer is all there is."""
        self._socket.send_multipart(parts)
        self._socket.send(m.encode(m.Welcome(""), MARK))
        answers: list[m.AnyMessage] = []
        while True:
            assert self._socket.poll(ANSWER_MS), "no answer"
            envelope = m.open_envelope(self._socket.recv())
            if envelope.request == MARK:
                return answers
            answers.append(m.read_body(envelope))

    def ask(self, message: m.Message) -> m.AnyMessage:
        """The one answer to a message."""
        (answer,) = self.say(m.encode(message, 1))
        return answer

    def renew(self) -> None:
        """Another connection: to the peer, somebody else."""
        self.close()
        self._socket = self._connect()

    def close(self) -> None:
        self._socket.close()


def opening(owner: shmbroker.Client, /, **changes: Any) -> m.OpenChannel:
    """The request by which a client opens its channel area 0, with ``changes``."""
    proper = m.OpenChannel(
        owner.id, "x", this_process(), owner.segment.name, 0, "test", "shm", "sem", names.bell_name(owner.instance, owner.id)
    )
    return m.OpenChannel(**{**{name: getattr(proper, name) for name in proper.__struct_fields__}, **changes})
