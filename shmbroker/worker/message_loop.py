"""The loop that runs the frames of the zmq lane, in a thread of its own, one call at a time with the frame thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.zmq_lane import ZmqWorkerSocket
from shmbroker.systemd.notify import Watchdog
from shmbroker.worker.backlog import Backlog
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.device_completions import InFlight, completed
from shmbroker.worker.draining import Stop
from shmbroker.worker.shares import Key, Shares
from shmbroker.worker.turns import Turns

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.1
"""How long the socket is waited for before the loop looks whether it is to stop."""

_MESSAGES_AT_ONCE = 256
"""Frames taken before anything else is looked at: a client that never stops sending must not keep the worker from stopping."""

_clock_ns = time.monotonic_ns


class MessageLoop:
    """Runs the frames that come by ``socket``, until told to ``stop``. Its thread begins with the first channel, and alone uses the socket.

    ``turns`` and ``shares``: the worker's. ``all_channels``: those of all lanes.
    """

    def __init__(
        self,
        socket: ZmqWorkerSocket,
        stop: Stop,
        turns: Turns,
        shares: Shares,
        all_channels: Callable[[], Sequence[WorkerChannel]],
        *,
        backlog: Backlog | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._socket = socket
        self._stop = stop
        self._turns = turns
        self._shares = shares
        self._all_channels = all_channels
        self._backlog = backlog
        self._watchdog = watchdog
        self._by_token: dict[bytes, WorkerChannel] = {}
        """The control thread puts channels in and takes them out; the loop's looks one up in its turn, so that none is closed between being found
        and being run."""
        self._thread: threading.Thread | None = None
        """Started by the control thread, joined by whoever has joined that one."""

    # --- from the control thread ------------------------------------------------------------------------------------------------------

    def add(self, channel: WorkerChannel) -> None:
        """Run the frames that come with the token of ``channel`` too."""
        self._by_token[channel.token] = channel
        if self._thread is None:
            self._thread = threading.Thread(target=self.serve, name="shmbroker-zmq-lane", daemon=True)
            self._thread.start()

    def remove(self, channel: WorkerChannel) -> None:
        """Begin no more of them."""
        self._by_token.pop(channel.token, None)

    def channels(self) -> list[WorkerChannel]:
        """Those that there are now. From any thread."""
        return list(self._by_token.values())

    def join(self) -> None:
        """Wait until the thread, where there is one, has ended: what it had begun when a stop was requested is answered then."""
        if self._thread is not None:
            self._thread.join()

    # --- its thread -------------------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run frames of the zmq lane until told to stop and those that had come are answered."""
        with torch.no_grad():
            self._run_until_stopped()

    def _run_until_stopped(self) -> None:
        while True:
            stopping = self._stop.requested  # of this turn: what had come when it was requested is answered in the next one
            if self._watchdog is not None:
                self._watchdog.turning("zmq lane")
            if not self._next():
                self._socket.wait(WAIT_SECONDS)
            self._take(_MESSAGES_AT_ONCE if stopping or self._shares.several or self._backlog else 1)
            while self._run_next() and stopping:
                pass
            if stopping:
                return

    def _take(self, most: int) -> None:
        """Put so many messages that have come to their channels, each for its turn."""
        for _ in range(most):
            message = self._socket.take()
            if message is None:
                return
            token, frame = message
            channel = self._by_token.get(token)
            if channel is None:
                log.warning("a frame with a token that no channel has was dropped")
            elif len(channel.waiting) >= channel.mapped.segment.geometry.depth:
                log.warning("client %s sends more frames than its channel may have: one was dropped", channel.opened.client_name)
            elif self._backlog is None:
                channel.wait(frame)
            elif (refused := self._backlog.let_in(channel, frame, self._all_channels())) is not None:
                self._socket.complete(token, refused)

    def _next(self) -> tuple[Key, bytes] | None:
        """Whose turn it is among the channels that have frames here, or an unfinished call: its key, and the channel's token."""
        waiting = [
            (self._shares.key(channel.share), token)
            for token, channel in list(self._by_token.items())
            if channel.unfinished is not None or channel.waiting
        ]
        return min(waiting, default=None)

    def _run_next(self) -> bool:
        """Run a call, or a piece of one, of the client whose turn it is; returns whether any waited."""
        chosen = self._next()
        if chosen is None:
            return False
        key, token = chosen
        self._turns.take(key)
        try:
            channel = self._by_token.get(token)
            if channel is None:  # closed meanwhile
                return True
            self._shares.begin(channel.share)
            begun_ns = _clock_ns()
            if channel.unfinished is not None:
                outcome: CompletionFields | InFlight | None = channel.go_on()
            else:
                outcome = channel.run_frame(channel.next_waiting(), self._stop.requested, divide=self._shares.several)
            if outcome is not None:
                self._socket.complete(token, completed(outcome))
            self._shares.charge(channel.share, _clock_ns() - begun_ns)
        finally:
            self._turns.give_back()
        return True
