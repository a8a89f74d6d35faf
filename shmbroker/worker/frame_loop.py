"""The loop that runs the frames of all channels, one call at a time, whichever lane they come by.

While one client alone has channels its frames are run as they come. With more, whose turn it is :class:`Shares` tells, before each call and between
the pieces of a long one.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable

import torch

from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.doorbell import PollingBell
from shmbroker.lane.python_ends import Receiver
from shmbroker.lane.shm_lane import Bell, ShmWorkerLane
from shmbroker.lane.waiter import Waiter
from shmbroker.lane.zmq_lane import ZmqWorkerSocket
from shmbroker.settings.kinds import Doorbell
from shmbroker.systemd.notify import Watchdog
from shmbroker.worker.backlog import Backlog
from shmbroker.worker.batch_runs import BatchRuns
from shmbroker.worker.batching import Batching
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.compiled_steps import Steps
from shmbroker.worker.device_completions import DeviceCompletions, InFlight
from shmbroker.worker.draining import Stop
from shmbroker.worker.message_loop import MessageLoop
from shmbroker.worker.shares import Shares
from shmbroker.worker.turns import Turns

log = logging.getLogger(__name__)

SHM_WAIT_SECONDS = 1.0
"""At most, for the next frame in shared memory; the waiter itself looks again sooner."""

_clock_ns = time.monotonic_ns


class FrameLoop:
    """Runs the frames of all channels, one call at a time, until told to ``stop``.

    Whose thread does what:

    - the *frame thread* is in :meth:`serve_shm`. It alone has the shm lanes, does all changes, and makes and stops the device's completions;
    - the *zmq thread* is that of a :class:`MessageLoop`, which alone uses ``socket``;
    - the *control thread* opens and closes channels: it calls :meth:`add_shm`, :meth:`add_zmq` and :meth:`remove`;
    - the thread of :class:`DeviceCompletions`, where the device is ``asynchronous``, writes the completions of the shm lane in the frame thread's place.

    Ops run without recording gradients, which is a thread's own mode: what they return would keep their inputs, and the outputs of call after call.

    ``bell``: what the frame thread sleeps on, rung by clients and by :meth:`change`. ``spin``: seconds to look before sleeping.
    ``shares``: of its time, by clients. ``backlog``: what lets frames in, where not as many may wait as come. ``batching``: what holds calls of the
    shm lane for those of other clients. ``watchdog``: thread-safe; fed by both loops.
    """

    def __init__(
        self,
        bell: Bell,
        socket: ZmqWorkerSocket,
        stop: Stop,
        *,
        spin: float,
        asynchronous: bool = False,
        shares: Shares | None = None,
        backlog: Backlog | None = None,
        batching: Batching | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.shares = shares or Shares()
        self._backlog = backlog
        self._bell = bell
        self._stop = stop
        self._spin = spin
        self._asynchronous = asynchronous
        self._watchdog = watchdog
        self._lanes: list[tuple[WorkerChannel, ShmWorkerLane]] = []
        """The frame thread's own."""
        self._completions: DeviceCompletions | None = None
        """The frame thread's own."""
        self._changes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """From any thread to the frame thread."""
        self.broken: queue.SimpleQueue[WorkerChannel] = queue.SimpleQueue()
        """Channels whose client does not keep the rules: from whoever writes completions to the control thread."""
        self._turns = Turns()
        """Taken by the frame thread and the zmq thread while an op runs, and while a channel is closed: the device does one thing at a time."""
        self._sharing = backlog is not None
        """The frame thread's own: whether there was more than one client when it last had nothing to do, or frames are let in."""
        self._last_lane = 0
        """The frame thread's own: where in the list the lane is that had the last turn."""
        self._device_free_ns = 0
        """Of an asynchronous device: when it was done with the last call."""
        self._batches = None if batching is None else BatchRuns(batching, self._turns, self.shares, self._run_turn, self._answer)
        """The frame thread's own."""
        self._messages = MessageLoop(socket, stop, self._turns, self.shares, self._all_channels, backlog=backlog, watchdog=watchdog)

    # --- from the control thread ------------------------------------------------------------------------------------------------------

    def change(self, change: Callable[[], None]) -> None:
        """Have the frame thread do ``change`` between two calls, when no device works on any. From any thread."""
        self._changes.put(change)
        self._bell.ring()

    def add_shm(self, channel: WorkerChannel, lane: ShmWorkerLane) -> None:
        """Run the frames of ``lane`` too."""
        self.change(lambda: self._lanes.append((channel, lane)))

    def add_zmq(self, channel: WorkerChannel) -> None:
        """Run the frames that come with the token of ``channel`` too."""
        self._messages.add(channel)

    def remove(self, channel: WorkerChannel, close: Callable[[], None]) -> threading.Event:
        """Run no more frames of ``channel``, and then ``close()``, while no call runs. Returns what is set when that is done."""
        self._messages.remove(channel)
        over = threading.Event()

        def removed() -> None:
            self._forget_lane(channel)
            with self._turns.between():
                close()
            over.set()

        self.change(removed)
        return over

    def join(self) -> None:
        """Wait until the zmq thread, where there is one, has ended: what it had begun when a stop was requested is answered then."""
        self._messages.join()

    # --- the frame thread ---------------------------------------------------------------------------------------------------------------

    def serve_shm(self) -> None:
        """Run frames in shared memory until told to stop and all that had come is answered."""
        if self._asynchronous:
            self._completions = DeviceCompletions()
        try:
            with torch.no_grad():
                self._run_until_stopped()
                self._refuse_what_has_come()
        finally:
            if self._completions is not None:
                self._completions.stop()
                self._completions = None

    def make_changes(self) -> None:
        """Do what :meth:`change` was asked for. In the frame thread, also after :meth:`serve_shm`."""
        if self._completions is not None:
            self._completions.drain()  # nothing is unmapped that a device still copies to
        while not self._changes.empty():
            self._changes.get()()

    def _run_until_stopped(self) -> None:
        lanes = self._lanes
        bell_waiter = Waiter(self._bell, self._spin)
        poll_waiter = Waiter(PollingBell(), self._spin)
        changes, shares = self._changes, self.shares

        def something() -> bool:
            if not changes.empty():
                return True
            for _, lane in lanes:
                if lane.ready():
                    return True
            return False

        waiter = bell_waiter
        receivers: tuple[Receiver, ...] = ()
        steps = Steps(self._turns, self._overfull)
        stop, watchdog = self._stop, self._watchdog
        while not stop.requested:
            if watchdog is not None:
                watchdog.turning("frames")
            if not changes.empty():
                steps.of(())
                self.make_changes()
                if self._completions is None:
                    steps.of(lanes)
                receivers = tuple([lane.receiver for _, lane in lanes])
                waiter = poll_waiter if any(lane.doorbell is Doorbell.POLL for _, lane in lanes) else bell_waiter
                # Both: the words of a client that is gone would keep its memory mapped.
                bell_waiter.sleeping = poll_waiter.sleeping = [lane.sleeping for _, lane in lanes]
            if self._sharing or shares.several:
                if not self._share(lanes):
                    waiter.wait(something, receivers, self._until_due())
            elif not steps.run() and not self._run_one_each(lanes, False):
                waiter.wait(something, receivers, SHM_WAIT_SECONDS)

    def _share(self, lanes: list[tuple[WorkerChannel, ShmWorkerLane]]) -> bool:
        """Give each client that is not ahead a turn, else the one that is ahead least; returns whether any wanted one."""
        self._sharing = True
        shares, batches, busy, ahead = self.shares, self._batches, False, False
        for channel, lane in lanes:
            if self._backlog is not None or batches is not None:
                self._let_in(channel, lane)
            if batches is not None and batches.holds(channel, lane):
                continue
            if shares.is_ahead(channel.share):
                ahead = True
            elif self._run_turn(channel, lane):
                busy = True
        if batches is not None:
            for batch in batches.batching.due(_clock_ns()):
                if batches.is_ahead(batch):
                    ahead = True
                else:
                    batches.run(batch)
                    busy = True
        if busy or (ahead and self._run_next(lanes)):
            return True
        if batches is None or batches.batching.seconds(0) is None:
            if self._turns.free:
                shares.rest()
            self._sharing = shares.several or self._backlog is not None
        return False

    def _until_due(self) -> float:
        """How long to wait for frames: until one that is held is due."""
        seconds = None if self._batches is None else self._batches.batching.seconds(_clock_ns())
        return SHM_WAIT_SECONDS if seconds is None else min(seconds, SHM_WAIT_SECONDS)

    def _refuse_what_has_come(self) -> None:
        """What had come, not what comes meanwhile: a client that never stops sending must not keep the worker from stopping. What was begun is finished."""
        if self._batches is not None:
            self._batches.batching.clear()
        for channel, lane in self._lanes:
            while channel.unfinished is not None:
                self._run_turn(channel, lane)
            while channel.waiting:
                self._answer(channel, lane, channel.run_frame(channel.next_waiting(), True))
        for _ in range(max([channel.mapped.segment.geometry.depth for channel, _ in self._lanes], default=0)):
            if not self._run_one_each(self._lanes, True):
                return

    def _run_one_each(self, lanes: list[tuple[WorkerChannel, ShmWorkerLane]], stopping: bool) -> bool:
        """Run one frame of each lane that has one; returns whether any had.

        A function of its own, so that no variable here keeps a channel, and its client's memory, when it is gone.
        """
        busy = False
        turns = self._turns
        for channel, lane in lanes:
            taken = lane.take()
            if taken is not None:
                busy = True
                if turns.waiting or not turns.device.acquire(False):
                    turns.wait(self.shares.key(channel.share))
                try:
                    completion = channel.run(taken, stopping)
                finally:
                    turns.give_back()
                if self._completions is None:
                    if not lane.complete(completion):  # type: ignore[arg-type]  # nothing is in flight without a device, and nothing divided
                        self._overfull(channel)
                else:
                    self._completions.put(completion, functools.partial(self._complete, channel, lane))  # type: ignore[arg-type]
        return busy

    def _run_next(self, lanes: list[tuple[WorkerChannel, ShmWorkerLane]]) -> bool:
        """Run a call, or a piece of one, of the client that is ahead least; returns whether any waits. The lanes of one client take turns."""
        after, batches = self._last_lane + 1, self._batches
        waiting = [
            (self.shares.key(lanes[index][0].share), (index - after) % len(lanes), index)
            for index in range(len(lanes))
            if (lanes[index][0].unfinished is not None or lanes[index][0].waiting or lanes[index][1].ready())
            and not (batches is not None and batches.batching.is_held(lanes[index][0]))
        ]
        first = None if batches is None else batches.next_of(batches.batching.due(_clock_ns()))
        if batches is not None and first is not None and (not waiting or first[0] < min(waiting)[0]):
            batches.run(first[1])
            return True
        if not waiting:
            return False
        self._last_lane = min(waiting)[2]
        return self._run_turn(*lanes[self._last_lane])

    def _let_in(self, channel: WorkerChannel, lane: ShmWorkerLane) -> None:
        """Have what has come on a lane wait in its channel, or refuse it."""
        backlog = self._backlog
        while len(channel.waiting) < channel.mapped.segment.geometry.depth:
            taken = lane.take()
            if taken is None:
                return
            if backlog is None:
                channel.wait(taken[4])
            elif (refused := backlog.let_in(channel, taken[4], self._all_channels())) is not None:
                self._answer(channel, lane, refused)
                return
        if lane.ready():  # one more than it may have: no wait would end while they are there
            self._too_many(channel, "has more calls on their way than its channel may have")

    def _all_channels(self) -> list[WorkerChannel]:
        return [*[channel for channel, _ in list(self._lanes)], *self._messages.channels()]

    def _run_turn(self, channel: WorkerChannel, lane: ShmWorkerLane) -> bool:
        """Run the next call of a lane, or the next piece of its unfinished one; returns whether there was any."""
        taken = None
        if channel.unfinished is None and not channel.waiting:
            taken = lane.take()
            if taken is None:
                return False
        turns, shares = self._turns, self.shares
        if turns.waiting or not turns.device.acquire(False):
            turns.wait(shares.key(channel.share))
        try:
            shares.begin(channel.share)
            begun_ns = _clock_ns()
            if taken is not None:
                completion = channel.run(taken, False, divide=True)
            elif channel.unfinished is not None:
                completion = channel.go_on()
            else:
                completion = channel.run_frame(channel.next_waiting(), False, divide=shares.several)
            shares.charge(channel.share, _clock_ns() - begun_ns)
        finally:
            turns.give_back()
        self._answer(channel, lane, completion)
        return True

    def _answer(self, channel: WorkerChannel, lane: ShmWorkerLane, completion: CompletionFields | InFlight | None) -> None:
        """Give a call's completion back, if it has one yet."""
        if completion is None:
            return
        if self._completions is not None:
            self._completions.put(completion, functools.partial(self._complete, channel, lane))
        elif not lane.complete(completion):  # type: ignore[arg-type]  # nothing is in flight without a device
            self._overfull(channel)

    def _complete(self, channel: WorkerChannel, lane: ShmWorkerLane, completion: CompletionFields) -> None:
        """In the thread of the device's completions."""
        self._charge_device(channel, completion)
        if not lane.complete(completion):
            self._overfull(channel)

    def _charge_device(self, channel: WorkerChannel, completion: CompletionFields) -> None:
        """For the time since the call was launched, or since the device was done with the one before."""
        done_ns = _clock_ns()
        self.shares.charge(channel.share, done_ns - max(self._device_free_ns, done_ns - completion[3]))
        self._device_free_ns = done_ns

    def _overfull(self, channel: WorkerChannel) -> None:
        self._too_many(channel, "left its completion queue full")

    def _too_many(self, channel: WorkerChannel, what: str) -> None:
        log.warning("client %s %s: its channel is closed", channel.opened.client_name, what)
        self.broken.put(channel)
        self.change(functools.partial(self._forget_lane, channel))

    def _forget_lane(self, channel: WorkerChannel) -> None:
        """Look at its queues no more."""
        if self._batches is not None:
            self._batches.batching.forget(channel)
        for pair in [pair for pair in self._lanes if pair[0] is channel]:
            self._lanes.remove(pair)
            pair[1].close()
