"""The loop that runs the frames of all channels, one call at a time, whichever lane they come by."""

from __future__ import annotations

import functools
import logging
import queue
import threading
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
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.device_completions import DeviceCompletions, completed
from shmbroker.worker.draining import Stop

log = logging.getLogger(__name__)

SHM_WAIT_SECONDS = 1.0
"""At most, for the next frame in shared memory; the waiter itself looks again sooner."""

ZMQ_WAIT_SECONDS = 0.1
"""How long the zmq lane is waited for before the loop looks whether it is to stop."""

_MESSAGES_AT_ONCE = 256
"""Frames taken from the zmq lane before anything else is looked at: a client that never stops sending must not keep the worker from stopping."""


class FrameLoop:
    """Runs the frames of all channels, one call at a time, until told to ``stop``.

    Whose thread does what:

    - the *frame thread* is in :meth:`serve_shm`. It alone has the shm lanes, does all changes, and makes and stops the device's completions;
    - the *zmq thread* is in :meth:`serve_zmq`, started here with the first channel of that lane. It alone uses ``socket``;
    - the *control thread* opens and closes channels: it calls :meth:`add_shm`, :meth:`add_zmq` and :meth:`remove`;
    - the thread of :class:`DeviceCompletions`, where the device is ``asynchronous``, writes the completions of the shm lane in the frame thread's place.

    Ops run without recording gradients, which is a thread's own mode: what they return would keep their inputs, and the outputs of call after call.

    ``bell``: what the frame thread sleeps on, rung by clients and by :meth:`change`. ``spin``: seconds to look before sleeping.
    ``watchdog``: thread-safe; fed by both loops.
    """

    def __init__(
        self, bell: Bell, socket: ZmqWorkerSocket, stop: Stop, *, spin: float, asynchronous: bool = False, watchdog: Watchdog | None = None
    ) -> None:
        self._bell = bell
        self._socket = socket
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
        self._running = threading.Lock()
        """Held by the frame thread and the zmq thread while an op runs, and while a channel is closed: the device does one thing at a time."""
        self._by_token: dict[bytes, WorkerChannel] = {}
        """Channels of the zmq lane. The control thread puts them in and takes them out; the zmq thread looks one up under ``_running``, so that none is
        closed between being found and being run."""
        self._zmq_thread: threading.Thread | None = None
        """Started by the control thread, joined by whoever has joined that one."""

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
        self._by_token[channel.token] = channel
        if self._zmq_thread is None:
            self._zmq_thread = threading.Thread(target=self.serve_zmq, name="shmbroker-zmq-lane", daemon=True)
            self._zmq_thread.start()

    def remove(self, channel: WorkerChannel, close: Callable[[], None]) -> threading.Event:
        """Run no more frames of ``channel``, and then ``close()``, while no call runs. Returns what is set when that is done."""
        self._by_token.pop(channel.token, None)
        over = threading.Event()

        def removed() -> None:
            self._forget_lane(channel)
            with self._running:
                close()
            over.set()

        self.change(removed)
        return over

    def finish_running(self) -> None:
        """Wait until the call that runs is answered. Once a stop was requested, none is begun any more."""
        with self._running:
            pass

    def join(self) -> None:
        """Wait until the zmq thread, where there is one, has ended. After :meth:`add_zmq` can be called no more."""
        if self._zmq_thread is not None:
            self._zmq_thread.join()

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
        changes = self._changes

        def something() -> bool:
            if not changes.empty():
                return True
            for _, lane in lanes:
                if lane.ready():
                    return True
            return False

        waiter = bell_waiter
        receivers: tuple[Receiver, ...] = ()
        stop, watchdog = self._stop, self._watchdog
        while not stop.requested:
            if watchdog is not None:
                watchdog.turning("frames")
            if not changes.empty():
                self.make_changes()
                receivers = tuple([lane.receiver for _, lane in lanes])
                waiter = poll_waiter if any(lane.doorbell is Doorbell.POLL for _, lane in lanes) else bell_waiter
                waiter.sleeping = [lane.sleeping for _, lane in lanes]
            if not self._run_one_each(lanes, False):
                waiter.wait(something, receivers, SHM_WAIT_SECONDS)

    def _refuse_what_has_come(self) -> None:
        """What had come, not what comes meanwhile: a client that never stops sending must not keep the worker from stopping."""
        for _ in range(max([channel.mapped.segment.geometry.depth for channel, _ in self._lanes], default=0)):
            if not self._run_one_each(self._lanes, True):
                return

    def _run_one_each(self, lanes: list[tuple[WorkerChannel, ShmWorkerLane]], stopping: bool) -> bool:
        """Run one frame of each lane that has one; returns whether any had.

        A function of its own, so that no variable here keeps a channel, and its client's memory, when it is gone.
        """
        busy = False
        for channel, lane in lanes:
            taken = lane.take()
            if taken is not None:
                busy = True
                with self._running:
                    completion = channel.run(taken, stopping)
                if self._completions is not None:
                    self._completions.put(completion, functools.partial(self._complete, channel, lane))
                elif not lane.complete(completion):  # type: ignore[arg-type]  # nothing is in flight without a device
                    self._overfull(channel)
        return busy

    def _complete(self, channel: WorkerChannel, lane: ShmWorkerLane, completion: CompletionFields) -> None:
        """In the thread of the device's completions."""
        if not lane.complete(completion):
            self._overfull(channel)

    def _overfull(self, channel: WorkerChannel) -> None:
        log.warning("client %s left its completion queue full: its channel is closed", channel.opened.client_name)
        self.broken.put(channel)
        self.change(functools.partial(self._forget_lane, channel))

    def _forget_lane(self, channel: WorkerChannel) -> None:
        """Look at its queues no more."""
        for pair in [pair for pair in self._lanes if pair[0] is channel]:
            self._lanes.remove(pair)
            pair[1].close()

    # --- the zmq thread -----------------------------------------------------------------------------------------------------------------

    def serve_zmq(self) -> None:
        """Run frames of the zmq lane until told to stop and those that had come are answered."""
        with torch.no_grad():
            self._run_messages_until_stopped()

    def _run_messages_until_stopped(self) -> None:
        while True:
            stopping = self._stop.requested  # of this turn: what had come when it was requested is answered in the next one
            if self._watchdog is not None:
                self._watchdog.turning("zmq lane")
            self._socket.wait(ZMQ_WAIT_SECONDS)
            for _ in range(_MESSAGES_AT_ONCE):
                taken = self._socket.take()
                if taken is None:
                    break
                self._run_message(*taken)
                taken = None
            if stopping:
                return

    def _run_message(self, token: bytes, frame: bytes) -> None:
        with self._running:
            channel = self._by_token.get(token)
            completion = None if channel is None else completed(channel.run_frame(frame, self._stop.requested))
            if completion is not None:
                self._socket.complete(token, completion)
        if completion is None:
            log.warning("a frame with a token that no channel has was dropped")
