"""Opening a channel: finding the worker of a service that has the fewest, and making the two ends of the lane to it.

How many a worker has, it says itself, and opens one more only while that is no more than any other was seen to have: of clients that open at the same
instant, having seen the same numbers, one is served and the others look again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import zmq

from shmbroker.call.completions import CompletionLoop
from shmbroker.call.queue_pair import QueuePair
from shmbroker.control import messages as m
from shmbroker.control.endpoint import is_left_behind, may_listen
from shmbroker.control.joining import ask_broker
from shmbroker.control.liveness import Watch, this_process
from shmbroker.control.sockets import Requester
from shmbroker.errors import (
    BadInput,
    BrokerUnreachable,
    Busy,
    ChannelError,
    NoSuchService,
    PeerRefused,
    ProtocolMismatch,
    SegmentError,
    ShmBrokerError,
    TooManyOpenFiles,
    WorkerLost,
)
from shmbroker.lane.choice import asked
from shmbroker.lane.doorbell import PollingBell, SemaphoreBell
from shmbroker.lane.shm_lane import CLIENT_SLEEPING, ShmClientLane, clear_channel
from shmbroker.lane.waiter import Waiter
from shmbroker.lane.zmq_lane import ZmqClientLane
from shmbroker.memory.open_files import require_files, telling_exhaustion
from shmbroker.memory.segment import Segment
from shmbroker.settings.arguments import seconds
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.settings.load import current
from shmbroker.trace.writer import Trace

log = logging.getLogger(__name__)

_NOT_THIS_ONE = (Busy, ChannelError, SegmentError, ProtocolMismatch, PeerRefused, TooManyOpenFiles, BrokerUnreachable)
"""Of one worker, and no reason why another one should not do."""

CHANNEL_FILES = 12
"""Open files that a channel takes at most: its sockets, the watch on its worker, and those that last for a moment."""

_SERVICE_POLL_SECONDS = 0.05

COUNT_SECONDS = 0.5
"""How long a worker may take to say how many channels it has. One that loads something meanwhile is the last to be given another."""

_MOST_LOOKS = 64
"""At the numbers of several workers, for one channel; then it is opened whatever they are."""

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
class Wanted:
    """The channel that is asked for. ``worker``: the name of the only one that will do; ``passed_over``: ids of those that will not."""

    service: str
    lane: Lane
    doorbell: Doorbell
    wait: float
    """Seconds."""
    worker: str | None
    passed_over: frozenset[str]

    @classmethod
    def of(
        cls,
        service: str | None,
        lane: str | None,
        doorbell: str | None,
        wait: float | None,
        worker: str | None = None,
        passed_over: frozenset[str] = frozenset(),
    ) -> Wanted:
        """What is not given is as the settings say. Raises :class:`BadInput`."""
        settings = current()
        service = settings.service if service is None else service
        lane, doorbell = settings.lane if lane is None else lane, settings.doorbell if doorbell is None else doorbell
        wait = settings.wait if wait is None else seconds("wait", wait)
        if not isinstance(service, str) or not service:
            raise BadInput(f"a service is named by a string, not by {service!r}")
        if worker is not None and (not isinstance(worker, str) or not worker):
            raise BadInput(f"a worker is named by a string, not by {worker!r}")
        return cls(service, *asked(lane, doorbell), wait, worker, passed_over)


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

    def find(self, wanted: Wanted) -> list[m.WorkerInfo]:
        """The workers that will do, waiting for one if there is none. Raises :class:`NoSuchService`."""
        service, wait, named = wanted.service, wanted.wait, wanted.worker
        until = time.monotonic() + wait
        instance = self._identity.instance
        while True:
            if self._stopped:
                raise ChannelError(_CLOSED)
            with self._lock:
                found = ask_broker(self._broker, m.FindService(service), m.Found, instance)
            workers = [worker for worker in found.workers if worker.peer not in wanted.passed_over and named in (None, worker.name)]
            if workers:
                return workers
            if time.monotonic() >= until:
                if named is not None and found.workers:
                    others = ", ".join([repr(worker.name) for worker in found.workers])
                    raise NoSuchService(
                        f"no worker named {named!r} offers service {service!r} on instance {instance!r} (those that do: {others}) and none came within "
                        f"{wait:g} s: name one of them, or leave worker= out for the one with the fewest channels"
                    )
                there = ", ".join(map(repr, found.services)) or "none at all"
                raise NoSuchService(
                    f"no worker offers service {service!r} on instance {instance!r} (offered: {there}) and none came within {wait:g} s: "
                    "start one, e.g. 'gpu-worker serve --model DIR'"
                )
            time.sleep(_SERVICE_POLL_SECONDS)

    def open_any(self, wanted: Wanted, index: int) -> Opened:
        """:meth:`find` workers and open a channel to the one with the fewest, or to another one, where that one cannot be reached or refuses.

        Raises what the first one failed with when there is no other.
        """
        require_files(CHANNEL_FILES, "a channel")
        failed: ShmBrokerError | None = None
        counts: dict[str, float] = {}
        for look in itertools.count(1):
            try:
                workers = self.find(wanted)
            except NoSuchService:
                if failed is None:
                    raise
                raise failed from None
            try:
                with telling_exhaustion("a channel"):
                    worker, at_most = self._fewest(workers, counts)
                    opened = self.open(wanted, worker, index, at_most if look < _MOST_LOOKS else None)
            except _NOT_THIS_ONE as error:
                if self._stopped:
                    raise
                log.warning("no channel to worker %r (pid %d): %s", worker.name, worker.process.pid, error)
                failed = failed or error
                wanted = replace(wanted, passed_over=wanted.passed_over | {worker.peer}, wait=0.0)
                continue
            if isinstance(opened, Opened):
                return opened
            counts[worker.peer] = opened.channels
        raise AssertionError("without a limit a channel is opened, or an error raised")

    def _fewest(self, workers: list[m.WorkerInfo], counts: dict[str, float]) -> tuple[m.WorkerInfo, int | None]:
        """The worker with the fewest channels, and how many it may have at most; ``counts``, by worker, are completed."""
        if len(workers) == 1:
            return workers[0], None
        for worker in workers:
            if worker.peer not in counts:
                counts[worker.peer] = self._count_of(worker)
        fewest, *others = sorted(workers, key=lambda worker: counts[worker.peer])
        second = counts[others[0].peer]
        return fewest, None if second == math.inf else int(second)

    def _count_of(self, worker: m.WorkerInfo) -> float:
        """How many channels it has; infinity where it does not say so."""
        try:
            with contextlib.closing(Requester(self._context, worker.endpoint)) as requester:
                return requester.ask(
                    m.AskChannels(), m.ChannelCount, COUNT_SECONDS, lambda: may_listen(worker.endpoint) and not self._stopped
                ).channels
        except TooManyOpenFiles:
            raise
        except (TimeoutError, ShmBrokerError) as error:
            log.debug("worker %r (pid %d) does not say how many channels it has: %s", worker.name, worker.process.pid, error)
            return math.inf

    def open(self, wanted: Wanted, worker: m.WorkerInfo, index: int, at_most: int | None = None) -> Opened | m.ChannelCount:
        """Have ``worker`` open a channel on area ``index``; how many it has, where those are more than ``at_most``.

        Raises :class:`WorkerLost`, :class:`ChannelError`, and what the worker refuses it with.
        """
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
                service=wanted.service,
                lane=wanted.lane.value,
                doorbell=wanted.doorbell.value,
                bell=identity.bell_name,
                at_most=at_most,
            )
            # Where its pid tells nothing: the kernel refuses connections to a socket whose owner has died.
            watch = Watch(worker.process, lambda: not is_left_behind(worker.endpoint))
            undo.callback(watch.close)
            answers: tuple[type[m.ChannelOpened | m.ChannelCount], ...] = (m.ChannelOpened,)
            if at_most is not None:
                answers = m.ChannelOpened, m.ChannelCount
            try:
                # fault: before channel opened
                answer = requester.ask(opening, answers, alive=lambda: watch.alive() and may_listen(worker.endpoint) and not self._stopped)
                if isinstance(answer, m.ChannelCount):
                    return answer
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
        return Opened(worker, answer, requester, self._pair(wanted.service, worker, answer, end, loop, watch))

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
