"""The thread that keeps a client or a worker known to the broker: hello, heartbeats, and news of peers that died.

Nothing that a call needs waits for this thread, and a broker that is gone costs nothing but its own services: when it comes back, the next
heartbeat is answered with another epoch, and the peer says Hello again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import zmq

from shmbroker.control.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatSeen,
    Hello,
    Message,
    PeerGone,
    PeerStats,
    Refused,
    Welcome,
    encode,
    open_envelope,
    read_body,
)
from shmbroker.control.sockets import error_named
from shmbroker.errors import BrokerUnreachable, PeerRefused, ProtocolMismatch, ShmBrokerError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
"""Half of what a returned broker may take to know everyone again."""

TICK_SECONDS = 0.1
"""How often :class:`BrokerLink` calls its ``tick``, where it has one."""

OUTDATED_SECONDS = 30.0
"""Between heartbeats to a broker of another version, which cannot take them: until this process is restarted, or the broker is again the one of before."""

HELLO_SECONDS = 5.0
"""How long the first Hello may take."""


class BrokerLink:
    """Keeps one process known to its broker, from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        hello: Callable[[], Hello],
        stats: Callable[[], PeerStats],
        peer_gone: Callable[[str], None],
        tick: Callable[[], None] | None = None,
    ) -> None:
        """``tick``: something small to be done every :data:`TICK_SECONDS`."""
        self._endpoint = endpoint
        self._hello = hello
        self._stats = stats
        self._peer_gone = peer_gone
        self._tick = tick
        self._epoch = ""
        self._refusal: ShmBrokerError | None = None
        """Why the broker does not take this process."""
        self._known = threading.Event()
        """The broker has answered the first Hello, be it with a refusal."""
        self._leave_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)  # milliseconds for the Goodbye to go out
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        # A broker that is away must not be greeted with the heartbeats of an hour.
        self._socket.setsockopt(zmq.SNDHWM, 16)
        self._socket.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="shmbroker-link", daemon=True)

    def start(self) -> None:
        """Say Hello and wait until the broker has answered. Raises :class:`BrokerUnreachable`, and what the broker refuses it with."""
        self._thread.start()
        if not self._known.wait(HELLO_SECONDS):
            self.stop()
            raise BrokerUnreachable(
                f"the broker at {self._endpoint} did not answer within {HELLO_SECONDS:g} s: is 'shmbroker serve' running?"
            )
        if self._refusal is not None:
            self.stop()
            raise self._refusal

    def stop(self) -> None:
        """Say Goodbye and end the thread. A second time does nothing."""
        if self._leave_fd >= 0:
            os.eventfd_write(self._leave_fd, 1)
            self._thread.join()
            os.close(self._leave_fd)
            self._leave_fd = -1

    def _send(self, message: Message) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("the broker takes nothing: %s dropped", type(message).__name__)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._leave_fd, zmq.POLLIN)
        try:
            self._send(self._hello())
            next_beat = time.monotonic() + HEARTBEAT_SECONDS
            while True:
                seconds = next_beat - time.monotonic()
                if self._tick is not None:
                    seconds = min(seconds, TICK_SECONDS)
                events = dict(poller.poll(max(0, int(seconds * 1000))))
                if self._leave_fd in events:
                    break
                if self._socket in events:
                    self._read()
                if self._tick is not None:
                    self._ticked(self._tick)
                if time.monotonic() >= next_beat:
                    self._send(Heartbeat(self._hello().peer, self._stats()))
                    next_beat = time.monotonic() + (OUTDATED_SECONDS if isinstance(self._refusal, ProtocolMismatch) else HEARTBEAT_SECONDS)
            self._send(Goodbye(self._hello().peer))
        finally:
            self._socket.close()

    def _refused(self, error: ShmBrokerError) -> None:
        """Told once, not at every heartbeat; who has joined works on with those that know it."""
        if self._refusal is None and self._known.is_set():
            if isinstance(error, ProtocolMismatch):
                log.warning("not known to the broker any more, and so not found by others, until this process is restarted: %s", error)
            else:
                log.warning("the broker refuses this process, which others may not find until it is taken again: %s", error)
        self._refusal = error
        self._known.set()

    @staticmethod
    def _ticked(tick: Callable[[], None]) -> None:
        try:
            tick()
        except Exception:  # the heartbeats must go on
            log.exception("telling the figures")

    def _read(self) -> None:
        try:
            message = read_body(open_envelope(self._socket.recv()))
        except ProtocolMismatch as error:
            self._refused(error)
            return
        except (ValueError, ShmBrokerError) as error:
            log.warning("the broker sent what cannot be read: %s", error)
            return
        if isinstance(message, Refused):
            refusal = error_named(message)
            if isinstance(refusal, PeerRefused):
                refusal = PeerRefused(f"the broker does not take this process: {refusal}")
            self._refused(refusal)
            return
        if isinstance(message, Welcome):
            self._refusal = None
            if self._epoch and message.epoch != self._epoch:
                log.info("known to the broker again, which is a new one (epoch %s)", message.epoch)
            self._epoch = message.epoch
            self._known.set()
        elif isinstance(message, HeartbeatSeen):
            if message.epoch != self._epoch or not message.known:
                self._send(self._hello())
            else:
                self._refusal = None
        elif isinstance(message, PeerGone) and message.peer == self._hello().peer:
            log.warning("the broker took this process for gone: joining anew")
            self._send(self._hello())
        elif isinstance(message, PeerGone):
            try:
                self._peer_gone(message.peer)
            except Exception:  # the heartbeats must go on
                log.exception("telling of the end of %s", message.peer)
