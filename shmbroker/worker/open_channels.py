"""The channels that are open on a worker, each on a client's segment that stays mapped for as long as it has any."""

from __future__ import annotations

import logging
import secrets
import threading
import time

from shmbroker.control.liveness import Watch
from shmbroker.control.messages import OpenChannel
from shmbroker.errors import Busy, ChannelError
from shmbroker.lane.doorbell import PollingBell, SemaphoreBell
from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.lane.zmq_lane import new_token
from shmbroker.memory import names
from shmbroker.memory.hold import is_surely_held
from shmbroker.memory.segment import Segment
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.trace.writer import Trace
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.counters import ChannelCounters
from shmbroker.worker.device_memory import DeviceMemory
from shmbroker.worker.frame_loop import FrameLoop
from shmbroker.worker.kept_tensors import DEFAULT_KEPT_BYTES, KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment

log = logging.getLogger(__name__)

OVER_SECONDS = 0.05
"""How long a client that closes a channel is kept waiting, and everybody else with it, for a call that still runs; then it asks again."""


SHARE_SECONDS = 1.0
"""Over which a client's share of the worker's time is told."""


class OpenChannels:
    """Opens channels, finds them by their number, drops them; ``frames`` runs what comes on them.

    Used by the control thread alone, and by whoever has joined it; :meth:`totals` by any thread. ``memory``: of the device that segments are mapped
    for. ``kept_bytes``: what each channel may have kept here. ``trace``: told of every call.
    ``tracebacks``: whether an op's error carries its traceback to the client. ``most``: how many may be open.
    """

    def __init__(
        self,
        instance: str,
        frames: FrameLoop,
        *,
        memory: DeviceMemory | None = None,
        kept_bytes: int = DEFAULT_KEPT_BYTES,
        trace: Trace | None = None,
        tracebacks: bool = True,
        most: int | None = None,
    ) -> None:
        self._most = most
        self._instance = instance
        self._frames = frames
        self._memory = memory
        self._kept_bytes = kept_bytes
        self._trace = trace
        self._tracebacks = tracebacks
        self._channels: dict[int, WorkerChannel] = {}
        """By number, which is random and told only to the client: whoever knows it may bind on the channel and close it."""
        self._mapped: dict[str, MappedSegment] = {}
        """By name, those that have users."""
        self._leaving: dict[int, threading.Event] = {}
        """By number, of channels that their clients have closed while a call ran: what is set when that has ended."""
        self._computed_ns: dict[int, int] = {}
        """By channel, at the last look at the shares."""
        self._next_shares = 0.0
        self._done = ChannelCounters()
        """Of channels that are closed."""

    # --- opening ------------------------------------------------------------------------------------------------------------------------

    def open(self, opening: OpenChannel, lane: Lane, doorbell: Doorbell, user: int | None = None) -> WorkerChannel:
        """Open a channel as the client asks, and have its frames run. ``user``: who asks, as the kernel says. Raises :class:`ChannelError`, :class:`SegmentError`, :class:`Busy`."""
        mapped = self._mapped_for(opening)
        try:
            self._check_area(opening, mapped.segment)
            served = _end_of(opening, mapped.segment, doorbell) if lane is Lane.SHM else None
        except BaseException:
            if not mapped.users:
                mapped.close()
            raise
        # Nothing fails from here on: what is counted now is counted back when the channel is dropped.
        mapped.users += 1
        self._drop_former(opening)
        self._mapped[opening.segment] = mapped
        channel = self._new_channel(opening, mapped)
        channel.user = user
        self._channels[channel.number] = channel
        if served is not None:
            channel.lane_waiting = served.waiting
            self._frames.add_shm(channel, served)
        else:
            channel.token = new_token()
            self._frames.add_zmq(channel)
        return channel

    def _mapped_for(self, opening: OpenChannel) -> MappedSegment:
        """The client's segment, mapped. Names follow from the client's id: nobody may have anything else opened here."""
        client = opening.client
        named = names.segment_name(self._instance, client), names.bell_name(self._instance, client)
        if names.parse(named[0][1:]) is None or (opening.segment, opening.bell) != named:
            raise ChannelError(f"segment {opening.segment!r} and doorbell {opening.bell!r} are not those of client {client!r}")
        return self._mapped.get(opening.segment) or MappedSegment(Segment.attach(opening.segment, hold=False), self._memory)

    def _check_area(self, opening: OpenChannel, segment: Segment) -> None:
        """Raise :class:`ChannelError` unless the client may have a channel there: it is the segment's owner, and no other process has the area."""
        if segment.owner != opening.client:
            raise ChannelError(f"segment {opening.segment} belongs to {segment.owner!r}, not to {opening.client!r}")
        if not 0 <= opening.index < segment.geometry.channel_count:
            raise ChannelError(f"channel area {opening.index} of {segment.geometry.channel_count} does not exist")
        former = self._open_on(opening)
        if former is not None and former.opened.process != opening.process:
            raise ChannelError(f"channel area {opening.index} of {opening.segment} is open for process {former.opened.process.pid}")
        if self._most is not None and former is None and len(self._channels) >= self._most:
            raise Busy(
                f"this worker has {len(self._channels)} channels open, as many as it takes: ask again when one is closed, start another worker of the "
                "service, or this one with a larger --max-channels"
            )

    def _open_on(self, opening: OpenChannel) -> WorkerChannel | None:
        """The channel that is open on the same area."""
        area = opening.segment, opening.index
        return next((c for c in self._channels.values() if (c.opened.segment, c.opened.index) == area), None)

    def _drop_former(self, opening: OpenChannel) -> None:
        """A client opens an area again when it gave up closing the channel there: that one is over, and an area never has two."""
        former = self._open_on(opening)
        if former is not None:
            self.drop(former)

    def _new_channel(self, opening: OpenChannel, mapped: MappedSegment) -> WorkerChannel:
        number, watch, kept = secrets.randbits(63), Watch(opening.process), KeptTensors(self._kept_bytes)
        share = self._frames.shares.open(opening.client, opening.client_name)
        if self._trace is not None:
            from shmbroker.worker.traced_channel import TracedWorkerChannel

            return TracedWorkerChannel(number, opening, mapped, watch, share, kept=kept, tracebacks=self._tracebacks, trace=self._trace)
        return WorkerChannel(number, opening, mapped, watch, share, kept=kept, tracebacks=self._tracebacks)

    # --- while they are open ------------------------------------------------------------------------------------------------------------

    def find(self, number: int) -> WorkerChannel:
        """The open channel of this number. Raises :class:`ChannelError` when there is none."""
        channel = self._channels.get(number)
        if channel is None:
            raise ChannelError(f"channel {number} is not open on this worker")
        return channel

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._channels)

    def publish(self) -> None:
        """Write in each client's segment what its channels have counted."""
        if time.monotonic() >= self._next_shares:
            self._next_shares = time.monotonic() + SHARE_SECONDS
            self._look_at_shares()
        for channel in self._channels.values():
            channel.publish()

    def _look_at_shares(self) -> None:
        """Who had how much of the time that was computed since the last look."""
        had: dict[str, int] = {}
        for channel in self._channels.values():
            before = self._computed_ns.get(channel.number, 0)
            now = self._computed_ns[channel.number] = channel.counters.compute_ns
            had[channel.opened.client] = had.get(channel.opened.client, 0) + now - before
        self._computed_ns = {number: self._computed_ns[number] for number in self._channels}
        total = sum(had.values())
        for channel in self._channels.values():
            channel.share_ppm = had[channel.opened.client] * 1_000_000 // total if total > 0 else 0

    def totals(self) -> tuple[int, int]:
        """Calls and errors of all channels that ever were."""
        channels = list(self._channels.values())
        return (
            self._done.calls + sum(channel.counters.calls for channel in channels),
            self._done.errors + sum(channel.counters.errors for channel in channels),
        )

    # --- dropping -----------------------------------------------------------------------------------------------------------------------

    def close_for_client(self, number: int) -> bool:
        """Drop the channel of this number; whether no call of it runs any more. Asked again, whether that has ended meanwhile.

        Raises :class:`ChannelError` when there is none, or its end was told.
        """
        if number not in self._leaving:
            self._leaving = {one: over for one, over in self._leaving.items() if not over.is_set()}  # of clients that asked no more
            self._leaving[number] = self._drop(self.find(number))
        over = self._leaving[number].wait(OVER_SECONDS)
        if over:
            del self._leaving[number]
        return over

    def drop(self, channel: WorkerChannel) -> None:
        """Close a channel, and its segment with the last one on it. A second time does nothing."""
        if channel.number in self._channels:
            self._drop(channel)

    def _drop(self, channel: WorkerChannel) -> threading.Event:
        """Of one that is open. Returns what is set when none of its calls runs any more."""
        del self._channels[channel.number]
        opened, counters = channel.opened, channel.counters
        log.info("channel area %d of %s closed after %d calls", opened.index, opened.client_name, counters.calls)
        self._done.calls += counters.calls
        self._done.errors += counters.errors
        self._frames.shares.close(channel.share)
        mapped = channel.mapped
        mapped.users -= 1
        unused = mapped.users == 0
        if unused:
            del self._mapped[opened.segment]  # now, not in a moment: who opens a channel meanwhile must not get what is being closed

        def close() -> None:
            channel.close()
            if unused:
                mapped.close()

        return self._frames.remove(channel, close)

    def drop_client(self, client: str) -> None:
        """Drop all channels of a client that the broker says is gone, unless it still holds its doorbell: then the broker is wrong (H5)."""
        for channel in [c for c in self._channels.values() if c.opened.client == client]:
            if not is_surely_held(names.bell_path(channel.opened.bell)):
                self.drop(channel)

    def drop_dead(self) -> None:
        """Drop the channels of processes that have ended."""
        for channel in [c for c in self._channels.values() if not c.watch.alive()]:
            self.drop(channel)

    def drop_broken(self) -> None:
        """Drop the channels whose clients do not keep the rules."""
        broken = self._frames.broken
        while not broken.empty():
            self.drop(broken.get())

    def close(self) -> None:
        """Drop all. In the frame thread, once it serves no more."""
        for channel in list(self._channels.values()):
            self.drop(channel)
        self._frames.make_changes()


def _end_of(opening: OpenChannel, segment: Segment, doorbell: Doorbell) -> ShmWorkerLane:
    """The worker's end of the channel area."""
    bell = SemaphoreBell(opening.bell) if doorbell is Doorbell.SEM else PollingBell()
    return ShmWorkerLane(segment, opening.index, bell)
