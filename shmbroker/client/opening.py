"""Opening a channel: finding a worker that offers a service, and making the two ends of the lane to it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from shmbroker.call.completions import CompletionLoop
from shmbroker.call.queue_pair import QueuePair
from shmbroker.control import messages as m
from shmbroker.control.endpoint import is_left_behind, may_listen
from shmbroker.control.joining import ask_broker
from shmbroker.control.liveness import Watch, this_process
from shmbroker.control.sockets import Requester
from shmbroker.errors import (
    BrokerUnreachable,
    ChannelError,
    NoSuchService,
    PeerRefused,
    ProtocolMismatch,
    SegmentError,
    ShmBrokerError,
    TooManyOpenFiles,
    WorkerLost,
)
from shmbroker.lane.doorbell import PollingBell, SemaphoreBell
from shmbroker.lane.shm_lane import CLIENT_SLEEPING, ShmClientLane, clear_channel
from shmbroker.lane.waiter import Waiter
from shmbroker.lane.zmq_lane import ZmqClientLane
from shmbroker.memory.open_files import require_files, telling_exhaustion
from shmbroker.memory.segment import Segment
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.trace.writer import Trace

log = logging.getLogger(__name__)

_NOT_THIS_ONE = (ChannelError, SegmentError, ProtocolMismatch, PeerRefused, TooManyOpenFiles, BrokerUnreachable)
"""Of one worker, and no reason why another one should not do."""

CHANNEL_FILES = 12
"""Open files that a channel takes at most: its sockets, the watch on its worker, and those that last for a moment."""

_SERVICE_POLL_SECONDS = 0.05
_CLOSED = "the client is closed"

STOP_SECONDS = 15.0
"""How long closing waits for a channel that another thread is opening: longer than any step of that takes."""

LOOK_SECONDS = 25e-6
"""How long whoever waits for a completion looks for it before deadlines and the doorbell are thought of."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a client is, to its broker and its workers."""

    instance: str
    id: str
    name: str
    bell_name: str
    """The doorbell that workers ring."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A channel that a worker has opened, from the client's side."""

    worker: m.WorkerInfo
    answer: m.ChannelOpened
    requester: Requester
    """To ask the worker by."""
    pair: QueuePair


class Opener:
    """Finds workers and opens channels to them. Thread-safe.

    ``broker``: to ask the broker by. ``bell``: what this process sleeps on. ``spin``: seconds to look for a completion before sleeping. ``trace``: where
    calls are told, if anywhere.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        broker: Requester,
        identity: Identity,
        segment: Segment,
        bell: SemaphoreBell,
        spin: float,
        trace: Trace | None,
    ) -> None:
        self._context = context
        self._broker = broker
        self._identity = identity
        self._segment = segment
        self._bell = bell
        self._spin = spin
        self._trace = trace
        self._lock = threading.Lock()
        self._loops: dict[Doorbell, CompletionLoop] = {}
        self._stopped = False
        self._openings = 0
        self._fewer = threading.Condition()
        """Of the openings under way."""

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Around finding a worker and opening a channel to it. Raises :class:`ChannelError` once the client is being closed."""
        with self._fewer:
            if self._stopped:
                raise ChannelError(_CLOSED)
            self._openings += 1
        try:
            yield
        finally:
            with self._fewer:
                self._openings -= 1
                self._fewer.notify_all()

    def stop(self) -> None:
        """Open no more channels. Who waits for a worker is told so; when this returns, nobody opens any more."""
        with self._fewer:
            self._stopped = True
            self._fewer.wait_for(lambda: not self._openings, STOP_SECONDS)

    def find(self, service: str, wait: float, passed_over: frozenset[str]) -> m.WorkerInfo:
        """A worker that offers ``service`` and is none of ``passed_over``, waiting ``wait`` seconds for one. Raises :class:`NoSuchService`."""
        until = time.monotonic() + wait
        instance = self._identity.instance
        while True:
            if self._stopped:
                raise ChannelError(_CLOSED)
            with self._lock:
                found = ask_broker(self._broker, m.FindService(service), m.Found, instance)
            for worker in found.workers:
                if worker.peer not in passed_over:
                    return worker
            if time.monotonic() >= until:
                there = ", ".join(map(repr, found.services)) or "none at all"
                raise NoSuchService(
                    f"no worker offers service {service!r} on instance {instance!r} (offered: {there}) and none came within {wait:g} s: "
                    "start one, e.g. 'gpu-worker serve --model DIR'"
                )
            time.sleep(_SERVICE_POLL_SECONDS)

    def open_any(self, service: str, wait: float, passed_over: frozenset[str], lane: Lane, doorbell: Doorbell, index: int) -> Opened:
        """:meth:`find` a worker and :meth:`open` a channel to it, or to another one that is there, where that one cannot be reached or refuses.

        Raises what the first one failed with when there is no other.
        """
        require_files(CHANNEL_FILES, "a channel")
        failed: ShmBrokerError | None = None
        while True:
            try:
                worker = self.find(service, wait, passed_over)
            except NoSuchService:
                if failed is None:
                    raise
                raise failed from None
            try:
                with telling_exhaustion("a channel"):
                    return self.open(service, worker, lane, doorbell, index)
            except _NOT_THIS_ONE as error:
                if self._stopped:
                    raise
                log.warning("no channel to worker %r (pid %d): %s", worker.name, worker.process.pid, error)
                failed = failed or error
                passed_over |= {worker.peer}
                wait = 0.0

    def open(self, service: str, worker: m.WorkerInfo, lane: Lane, doorbell: Doorbell, index: int) -> Opened:
        """Have ``worker`` open a channel on area ``index``. Raises :class:`WorkerLost`, :class:`ChannelError`, and what the worker refuses it with."""
        clear_channel(self._segment, index)
        identity = self._identity
        with contextlib.ExitStack() as undo:
            requester = Requester(self._context, worker.endpoint)
            undo.callback(requester.close)
            opening = m.OpenChannel(
                client=identity.id,
                client_name=identity.name,
                process=this_process(),
                segment=self._segment.name,
                index=index,
                service=service,
                lane=lane.value,
                doorbell=doorbell.value,
                bell=identity.bell_name,
            )
            # Where its pid tells nothing: the kernel refuses connections to a socket whose owner has died.
            watch = Watch(worker.process, lambda: not is_left_behind(worker.endpoint))
            undo.callback(watch.close)
            try:
                # fault: before channel opened
                answer = requester.ask(
                    opening, m.ChannelOpened, alive=lambda: watch.alive() and may_listen(worker.endpoint) and not self._stopped
                )
                # fault: after channel opened
                end, loop = self._end(answer, index)
            except TimeoutError as error:
                who = f"worker {worker.name!r} (pid {worker.process.pid})"
                if self._stopped:
                    raise ChannelError(_CLOSED) from None
                if not watch.alive():
                    raise WorkerLost(f"{who} died while a channel to it was opened") from None
                raise ChannelError(f"{who} does not answer: {error}") from None
            except ValueError as error:
                if isinstance(error, ShmBrokerError):
                    raise
                raise ChannelError(f"worker {worker.name!r} (pid {worker.process.pid}) answered what cannot be used: {error}") from None
            undo.pop_all()
        return Opened(worker, answer, requester, self._pair(service, worker, answer, end, loop, watch))

    def _end(self, answer: m.ChannelOpened, index: int) -> tuple[ShmClientLane | ZmqClientLane, CompletionLoop]:
        """The client's end of the lane that the worker chose, and the loop that waits for what comes out of it."""
        if Lane(answer.lane) is Lane.SHM:
            doorbell = Doorbell(answer.doorbell)
            worker_bell = SemaphoreBell(answer.bell) if doorbell is Doorbell.SEM else PollingBell()
            return ShmClientLane(self._segment, index, worker_bell), self._loop(doorbell)
        end = ZmqClientLane(self._context, answer.endpoint, answer.token, self._segment.geometry.depth)
        return end, CompletionLoop(lambda ready, receivers, seconds: end.wait(seconds))

    def _pair(
        self,
        service: str,
        worker: m.WorkerInfo,
        answer: m.ChannelOpened,
        end: ShmClientLane | ZmqClientLane,
        loop: CompletionLoop,
        watch: Watch,
    ) -> QueuePair:
        if self._trace is None:
            return QueuePair(service, worker, end, loop, watch)
        from shmbroker.call.traced_queue_pair import TracedQueuePair

        return TracedQueuePair(self._trace, answer.channel, service, worker, end, loop, watch)

    def _loop(self, doorbell: Doorbell) -> CompletionLoop:
        """The waiters on this process's doorbell: one loop for all channels of the shm lane that use it."""
        with self._lock:
            if doorbell not in self._loops:
                bell = self._bell if doorbell is Doorbell.SEM else PollingBell()
                waiter = Waiter(bell, self._spin, [(self._segment.words, CLIENT_SLEEPING // 8)])
                self._loops[doorbell] = CompletionLoop(waiter.wait, min(self._spin, LOOK_SECONDS))
            return self._loops[doorbell]

    def close(self) -> None:
        """End the loops' background threads, once all channels are closed."""
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()
