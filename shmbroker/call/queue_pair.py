"""A queue pair: the client's ends of a channel's submission queue and completion queue, and the calls that are outstanding between them.

The way down ends here: :meth:`QueuePair.submit` writes a call's frame into the lane. The way up begins here: :meth:`QueuePair.drain` takes completions
off the lane and finishes the calls that they answer.

Who may touch what: any thread submits, under the pair's own lock. Completions are taken, and the worker's death is acted on, by whoever has the lead of
the pair's :class:`~shmbroker.call.completions.CompletionLoop`, and by nobody else.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence, Sized
from typing import Protocol

from shmbroker.call.call import Call, clock_ns
from shmbroker.call.completions import CompletionLoop, Waitable
from shmbroker.call.state import OUTSTANDING
from shmbroker.call.statistics import no_calls
from shmbroker.control import messages as m
from shmbroker.control.liveness import Watch
from shmbroker.errors import CallTimeout, ShmBrokerError, WorkerLost, anew
from shmbroker.lane.doorbell import RECHECK_SECONDS
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.shm_lane import ShmClientLane
from shmbroker.lane.zmq_lane import ZmqClientLane
from shmbroker.settings.kinds import Lane

log = logging.getLogger(__name__)


class Closeable(Protocol):
    """What is closed with a pair."""

    def close(self) -> None:
        """A second time does nothing."""


class QueuePair:
    """Carries calls to one worker and brings their completions. Thread-safe. It owns the lane's end and the watch on the worker."""

    # What compiled calls look at too has slots.
    __slots__ = ("__dict__", "__weakref__", "_due", "_lost", "_outstanding", "buckets", "lane")

    def __init__(
        self,
        service: str,
        worker: m.WorkerInfo,
        lane: ShmClientLane | ZmqClientLane,
        completions: CompletionLoop,
        watch: Watch | None = None,
    ) -> None:
        """``completions``: the loop that waits where ``lane``'s completions come in; the pair joins it. ``watch``: on the worker, from now on the pair's."""
        self.worker_name = worker.name
        self.worker_pid = worker.process.pid
        self.lane = lane
        self.completions = completions
        self.buckets = no_calls()
        """Histogram of the calls' times."""
        self.has_frames = lane.ready
        """Whether a completion waits to be taken."""
        self.receivers = lane.receivers
        self.nudge = lane.nudge
        """Wake the worker if it sleeps: a frame will follow in a moment."""
        self._service = service
        self._watch = watch or Watch(worker.process)
        self._submit_lock = threading.Lock()
        self._outstanding: dict[int, Call] = {}
        self.unanswered: list[Sequence[object]] = []
        """The holds of the blocks of calls that were outstanding when the channel was closed, until the worker is known not to run them."""
        self.call_ids = itertools.count(1)
        """Of this pair's calls: whoever takes one has it alone, with no lock."""
        self._unknown_completions = 0
        self._lost: ShmBrokerError | None = None
        """Why no call is taken any more: in these words, by an error of its own for each."""
        self.fast_ends: Closeable | None = None
        """What compiled calls have of the lane, once there are any."""
        self._due: Sized = ()
        self._do_due: Callable[[], None] = _nothing
        completions.add(self)

    # --- down -------------------------------------------------------------------------------------------------------------------------

    def submit(self, call: Call, template: FrameTemplate, offsets: list[int], generations: list[int]) -> None:
        """Write the frame of ``call`` and ring. Waits for a free slot until the call's deadline when the queue is full.

        Raises :class:`WorkerLost` on a pair that is lost, :class:`CallTimeout` when no slot came free in time.
        """
        if self._due:
            self._do_due()
        while not self.try_submit(call, template, offsets, generations):
            self._wait_for_slot(call)

    def try_submit(self, call: Call, template: FrameTemplate, offsets: list[int], generations: list[int]) -> bool:
        """Write the frame of ``call`` and ring; False while the queue is full, or as many calls as it has slots are outstanding."""
        lock = self._submit_lock
        lock.acquire()
        try:
            if self._lost is not None:
                raise anew(self._lost)
            outstanding = self._outstanding
            lane = self.lane
            if len(outstanding) >= lane.depth:
                return False
            call.call_id = call_id = next(self.call_ids)
            call.submitted_ns = now = clock_ns()
            outstanding[call_id] = call  # before the frame is seen: the answer may be there in the same moment
            try:
                written = lane.submit(template, call_id, call.deadline_ns, now, offsets, generations)
            except Exception:  # an interrupt may come after the frame is seen: such a call stays outstanding
                outstanding.pop(call_id, None)
                raise
            if not written:
                del outstanding[call_id]
            return written
        finally:
            lock.release()

    def do_first(self, due: Sized, action: Callable[[], None]) -> None:
        """Have ``action()`` done before each submission for as long as ``due`` is not empty. It may itself :meth:`try_submit`."""
        self._due = due
        self._do_due = action

    def _wait_for_slot(self, call: Call) -> None:
        left = (call.deadline_ns - clock_ns()) / 1e9 if call.deadline_ns else RECHECK_SECONDS
        if left <= 0:
            raise CallTimeout(
                f"op {call.statistics.name!r}: {len(self._outstanding)} calls are outstanding with {self.peer_text()} and none was "
                "completed before the deadline"
            )
        self.completions.wait_any(left)

    # --- up ---------------------------------------------------------------------------------------------------------------------------

    def wait(self, call: Waitable, timeout: float | None = None) -> bool:
        """Wait until ``call`` is done. Its own deadline fails it; an earlier ``timeout`` (seconds) only ends the waiting: False."""
        deadline_ns = call.deadline_ns
        if timeout is not None:
            patience_ns = clock_ns() + max(1, int(timeout * 1e9))
            if not deadline_ns or patience_ns < deadline_ns:
                return self.completions.wait(call, patience_ns)
        if not self.completions.wait(call, deadline_ns):
            self.expire(call)
        return True

    def look(self, call: Waitable) -> bool:
        """Take what completions there are, without waiting, and fail ``call`` when its deadline has passed; whether it is done or has failed."""
        if call.state is OUTSTANDING:
            self.completions.look()
            if call.state is OUTSTANDING and call.deadline_ns and clock_ns() >= call.deadline_ns:
                self.expire(call)
        return call.state is not OUTSTANDING

    def expire(self, call: Waitable) -> None:
        """The deadline of ``call`` has passed: it fails, for a better reason where there is one."""
        self.completions.check_peers()
        call.expire()

    finished = staticmethod(Call.finish)
    """``finished(call, completion, taken_ns)``: what is done with a completion that was taken. A traced pair does more."""

    def drain(self) -> None:
        """Take all completions there are and finish their calls. Called by the leader of the waiters only."""
        take = self.lane.take
        outstanding = self._outstanding
        for _ in range(self.lane.depth):  # as many as there can be: who sends more must not hold up a caller's deadline
            completion = take()
            if completion is None:
                return
            taken_ns = clock_ns()
            call = outstanding.pop(completion[0], None)
            if call is None:
                self._unknown_completions += 1
                if self._unknown_completions in (1, 1000):  # a peer must not fill the log
                    log.warning("%s completed call %d, which is not outstanding: ignored, as all such", self.peer_text(), completion[0])
            else:
                self.finished(call, completion, taken_ns)
            if not outstanding:
                return  # whatever else there is answers nothing

    # --- the worker's end -------------------------------------------------------------------------------------------------------------

    def alive(self) -> bool:
        """Whether the worker's process lives, or cannot be watched from here."""
        return self._watch.alive()

    def check_peer(self) -> None:
        """Fail what is outstanding when the worker has died. Called by the leader of the waiters only."""
        if self._lost is None and not self._watch.alive():
            self.drain()  # what it answered before it died is answered
            self.lose(f"{self.peer_text()} died")

    def peer_gone(self) -> None:
        """The broker says that the worker is gone. No callback is run here: who says so has other things to do."""

        def end() -> None:
            if self._lost is None:
                self.check_peer()
                self.drain()
                self.lose(f"{self.peer_text()} left")

        self.completions.alone(end, settle_here=False)

    def lose(self, why: str, *, worker_goes_on: bool = False) -> None:
        """No call will be answered any more: fail those outstanding.

        ``worker_goes_on``: it may still run one of them, so that the blocks of all stay theirs, in ``unanswered``.
        """
        with self._submit_lock:
            if self._lost is not None:
                return
            self._lost = WorkerLost(f"{why}; open a new channel once a worker offers {self._service!r} again")
            lost, self._outstanding = self._outstanding, {}
        if worker_goes_on:
            self.unanswered = [call.holds for call in lost.values()]
        for call in lost.values():
            call.fail(WorkerLost(f"op {call.statistics.name!r}, call {call.call_id}: {why} before it answered"))

    def loss(self) -> ShmBrokerError | None:
        """Why no call will be answered any more; None while the worker lives."""
        if self._lost is None and not self._watch.alive():
            self.completions.alone(self.check_peer)
        return self._lost and anew(self._lost)

    def check_open(self) -> None:
        """Raise what :meth:`loss` has found before. Nothing is looked at."""
        if self._lost is not None:
            raise anew(self._lost)

    def peer_text(self) -> str:
        """The worker, for messages."""
        state = "running" if self._watch.alive() else "dead"
        return f"worker {self.worker_name!r} (pid {self.worker_pid}, {state})"

    @property
    def outstanding(self) -> int:
        """Calls that were submitted and not yet answered."""
        return len(self._outstanding)

    # --- leaving ----------------------------------------------------------------------------------------------------------------------

    def disown(self, error: ShmBrokerError) -> None:
        """In a forked child: the pair is the parent's."""
        self._submit_lock = threading.Lock()  # which some thread of the parent may have had
        self._lost = error

    def stop(self, why: str) -> None:
        """Take no more completions, and fail what is outstanding. When this returns, no thread reads from the lane."""
        self.completions.remove(self)
        self.completions.alone(lambda: self.lose(why, worker_goes_on=True))

    def close(self) -> None:
        """Let go of the lane and of the watch, after :meth:`stop`."""
        self.has_frames = bool  # never
        self.receivers = ()
        self.nudge = _nothing
        if self.fast_ends is not None:
            self.fast_ends.close()
        self.completions.alone(self.lane.close)  # nobody waits on it then, and whoever comes later finds it closed
        if self.lane.kind is Lane.ZMQ:
            self.completions.close()  # it was this pair's alone
        self._watch.close()


def _nothing() -> None:
    """Who is nudged by a closed pair; what is due before a submission where nothing is."""
