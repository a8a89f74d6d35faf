"""The zmq lane: the same frames as ZeroMQ messages, on sockets of the channel's own. Slower, and works everywhere.

A channel has two client sockets, one that only sends and one that only receives, so that a thread that submits never waits for one that
waits for completions (a ZeroMQ socket is used by one thread at a time)::

    client  DEALER "s" + token  ---- submissions --->   ROUTER  worker
    client  DEALER "c" + token  <--- completions ----

The token is made by the worker for each channel and told only to its client: it is what a frame is known by.
"""

from __future__ import annotations

import contextlib
import secrets

import zmq

from shmbroker.errors import ChannelError
from shmbroker.lane.completion_frames import CompletionFields, read_completion, write_completion
from shmbroker.lane.frames import FrameTemplate, private_slot
from shmbroker.lane.python_ends import Receiver
from shmbroker.memory import layout
from shmbroker.settings.kinds import Doorbell, Lane

SUBMIT = b"s"
COMPLETE = b"c"
READY = b"ready"
"""Sent by the completion socket when it connects, and echoed: after that the worker can reach it."""

CONNECT_SECONDS = 5.0
"""How long the first exchange on a new channel may take; on one machine it takes a millisecond."""

_PASSED_OVER = 256
"""Messages other than frames that are taken at once: whoever sends such without end must not keep the worker from all else."""


def new_token() -> bytes:
    """A fresh token of a channel, 16 bytes."""
    return secrets.token_bytes(16)


class ZmqClientLane:
    """The client's end: ``submit`` frames, ``take`` completions. Callers serialise each of the two sides."""

    kind = Lane.ZMQ
    doorbell = Doorbell.SOCKET
    receivers: tuple[Receiver, ...] = ()
    """There is nothing in memory to look at."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, token: bytes, depth: int) -> None:
        """Connect and exchange the first messages. Raises TimeoutError when the worker does not answer."""
        self.depth = depth
        self.socket_bytes = 0
        """Bytes of all messages sent and received."""
        self._slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
        self._submit = self._connect(context, endpoint, SUBMIT + token)
        self._complete = self._connect(context, endpoint, COMPLETE + token)
        self._complete.send(READY)
        if not self._complete.poll(int(CONNECT_SECONDS * 1000)):
            self.close()
            raise TimeoutError(f"the worker did not answer on {endpoint}")
        self._complete.recv()

    @staticmethod
    def _connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.IDENTITY, identity)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, layout.COMPLETION_SLOT_BYTES)
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ChannelError(f"{endpoint!r}, with a token of {len(identity) - 1} bytes, cannot be connected to: {error}") from None
        return socket

    def nudge(self) -> None:
        """Nothing sleeps on this lane that could be woken beforehand."""

    def submit(
        self, template: FrameTemplate, call_id: int, deadline_ns: int, submitted_ns: int, offsets: list[int], generations: list[int]
    ) -> bool:
        """Send a frame. Always True: the socket has room for as many as may be outstanding."""
        template.write(self._slot, call_id, deadline_ns, submitted_ns, offsets, generations)
        self._submit.send(self._slot.bytes[: template.nbytes])
        self.socket_bytes += template.nbytes
        return True

    def ready(self) -> bool:
        """Whether a completion has come."""
        return bool(int(self._complete.get(zmq.EVENTS)) & zmq.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Block until a completion comes, for ``seconds`` at most. A lane that is closed has none."""
        return not self._complete.closed and bool(self._complete.poll(max(1, int(seconds * 1000))))

    def take(self) -> CompletionFields | None:
        """The next completion, or None. Those that cannot be one are passed over, so many at most: a peer could go on for ever."""
        for _ in range(self.depth):
            try:
                frame = self._complete.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            self.socket_bytes += len(frame)
            completion = read_completion(frame)
            if completion is not None:
                return completion
        return None

    def close(self) -> None:
        """Close both sockets."""
        self._submit.close()
        with contextlib.suppress(AttributeError):  # when the constructor failed between the two
            self._complete.close()


class ZmqWorkerSocket:
    """The worker's end of all its zmq channels: one ROUTER."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, layout.SUBMISSION_SLOT_BYTES)  # whoever sends more is disconnected
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._slot = private_slot(layout.COMPLETION_SLOT_BYTES)

    def wait(self, seconds: float) -> bool:
        """Block until a frame comes, for ``seconds`` at most."""
        return bool(self.socket.poll(max(1, int(seconds * 1000))))

    def take(self) -> tuple[bytes, bytes] | None:
        """The next submission as token and frame, or None; first messages of new channels are answered on the way."""
        for _ in range(_PASSED_OVER):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(parts) != 2:
                continue
            identity, frame = parts
            if identity.startswith(COMPLETE) and frame == READY:
                self._send(identity, READY)
            elif identity.startswith(SUBMIT):
                return identity[1:], frame
        return None

    def complete(self, token: bytes, completion: CompletionFields) -> None:
        """Send a completion to the channel of ``token``; to nobody if it is gone."""
        nbytes = write_completion(self._slot, completion)
        self._send(COMPLETE + token, bytes(self._slot.bytes[:nbytes]))

    def _send(self, identity: bytes, payload: bytes) -> None:
        # NOBLOCK: a client that takes nothing must not stop the worker; ROUTER drops what it cannot deliver.
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([identity, payload], zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
