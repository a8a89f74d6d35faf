"""A client: joins a broker, has a segment of its own in which tensors are placed, and opens channels to workers."""

from __future__ import annotations

import functools
import logging
import os
import threading
from types import TracebackType

import torch
from msgspec import UNSET, UnsetType

from shmbroker.arena.arena import Arena
from shmbroker.arena.cuda_runtime import Cuda
from shmbroker.arena.device_arena import DeviceArena
from shmbroker.call.client_memory import ClientMemory
from shmbroker.client import open_clients
from shmbroker.client.areas import Areas
from shmbroker.client.channel import Channel
from shmbroker.client.closing import Closing
from shmbroker.client.failover import FailoverChannel
from shmbroker.client.opening import Identity, Opener, Wanted
from shmbroker.client.own_segment import own_segment, without_a_name
from shmbroker.client.publisher import Publisher
from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.broker_link import BrokerLink
from shmbroker.control.joining import ask_broker, peer_name, resolve_instance
from shmbroker.control.liveness import this_process
from shmbroker.control.sockets import Requester
from shmbroker.errors import BadInput, ChannelError
from shmbroker.lane.own_bell import OwnBell
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.open_files import require_files, telling_exhaustion
from shmbroker.settings.arguments import seconds, seconds_or_none, whole
from shmbroker.settings.load import current
from shmbroker.settings.sizes import parse_bytes
from shmbroker.trace.writer import Trace
from shmbroker.version import __version__

log = logging.getLogger(__name__)

JOINING_FILES = 32
"""Open files that a client takes at most before its first channel, most of them libzmq's."""


def connect(
    instance: str | None = None,
    *,
    arena: int | str | None = None,
    name: str | None = None,
    timeout: float | UnsetType | None = UNSET,
    place_timeout: float | None = None,
    spin: float | None = None,
    channels: int | None = None,
    depth: int | None = None,
    trace: str | os.PathLike[str] | None = None,
) -> Client:
    """Join the broker of ``instance`` and have a segment made. What is not given is taken from the settings (docs/configuration.md).

    ``arena``: bytes for tensors, or a text like ``"512M"``; all of it is reserved now. ``timeout``: seconds that a call may take, None for no
    limit. ``place_timeout``: seconds to wait for room in a full arena. ``spin``: seconds to look for a completion before sleeping; 0 to do so
    after 5 us. ``channels``: how many may be open. ``depth``: calls in flight on each, a power of two. ``trace``: a file that tells of every call
    (docs/traces.md).

    The broker is found by unix socket, or by $SHMBROKER_CONTROL and $SHMBROKER_KEYS (``shmbroker serve --control``).

    Raises :class:`BrokerUnreachable`, :class:`SharedMemoryFull`, :class:`QuotaExceeded`, :class:`TooManyClients`, :class:`TooManyOpenFiles`,
    :class:`BadInput`.
    """
    settings = current()
    with telling_exhaustion("connect()"):
        return Client(
            resolve_instance(instance),
            arena_bytes=layout.round_up(parse_bytes(settings.arena if arena is None else arena), layout.PAGE),
            name=peer_name(name),
            timeout=settings.timeout if timeout is UNSET else seconds_or_none("timeout", timeout),
            place_timeout=settings.place_timeout if place_timeout is None else seconds("place_timeout", place_timeout),
            spin=settings.spin * 1e-6 if spin is None else seconds("spin", spin),
            channel_count=settings.channels if channels is None else channels,
            depth=settings.depth if depth is None else depth,
            trace=trace,
        )


class Client:
    """Made by :func:`connect`; a context manager. Thread-safe. Belongs to the process that made it: connect anew after a fork."""

    def __init__(
        self,
        instance: str,
        *,
        arena_bytes: int,
        name: str,
        timeout: float | None,
        place_timeout: float,
        spin: float,
        channel_count: int,
        depth: int,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        try:
            geometry = Geometry(arena_bytes, whole("channels", channel_count), whole("depth", depth))
        except ValueError as error:
            raise BadInput(str(error)) from None
        self.instance = instance
        self.name = name
        self.id = names.new_id()
        self.timeout = timeout
        self._pid = os.getpid()
        self._unusable = ""
        """Why, in words for its user."""
        self._channels: list[Channel] = []
        self._areas = Areas(geometry.channel_count)
        self._lock = threading.Lock()
        """Of the list above, which any thread may change."""
        self._again = functools.partial(
            Client,
            instance,
            arena_bytes=arena_bytes,
            name=name,
            timeout=timeout,
            place_timeout=place_timeout,
            spin=spin,
            channel_count=channel_count,
            depth=depth,
            trace=trace,
        )
        self._successor: Client | None = None
        self._joining = threading.Lock()
        """Of the successor, and of the doorbell's name."""
        require_files(JOINING_FILES, "connect()")
        access = Access.of(instance)
        self._closing = closing = Closing(f"client {name}")
        try:
            told: Trace | None = None
            if trace is not None:
                told = Trace(trace, f"client {name}")
                closing.add(told.close)
            context = access.context()
            closing.add(context.term)
            broker = Requester(context, access.endpoint)
            closing.add(broker.close)
            self._link: BrokerLink | None = None
            # Undone after the holds are released, so that the broker, on our Goodbye, finds nothing held.
            closing.add(self._stop_link)
            self.segment = own_segment(broker, instance, self.id, geometry, closing)
            """As it is mapped here."""
            self._bell = OwnBell(lambda: ask_broker(broker, m.MakeBell(self.id, this_process()), m.Made, instance).name)
            closing.add(self._give_up_bell)
            self.memory = self._memory = ClientMemory(self.segment, place_timeout)
            """Where tensors are placed; the second one is that of this client's own segment."""
            closing.add(lambda: self._memory.close(self._unusable))
            self._publisher = Publisher(self.segment, self._memory.arena, lambda: list(self._channels))
            closing.add(self._publisher.close)
            identity = Identity(instance, self.id, name, self._bell.name)
            self._opener = Opener(context, broker, identity, self.segment, self._bell.bell, spin, told)
            closing.add(self._opener.close)
            self._link = BrokerLink(context, access.endpoint, self._hello, self._stats, self._peer_gone, self._publisher.publish)
            self._link.start()
            closing.add(self._close_channels)
            closing.add(self._opener.stop)
        except BaseException:
            closing.close()
            raise
        open_clients.add(self)

    # --- joining ----------------------------------------------------------------------------------------------------------------------

    def _hello(self) -> m.Hello:
        return m.Hello(role="client", peer=self.id, process=this_process(), name=self.name, version=__version__, segment=self.segment.name)

    def _stats(self) -> m.PeerStats:
        occupancy = self._memory.arena.occupancy()
        channels = tuple(channel.info() for channel in list(self._channels))
        return m.PeerStats(
            calls=sum(channel.calls for channel in channels),
            channels=channels,
            arena=m.ArenaInfo(occupancy.total_bytes, occupancy.held_bytes, occupancy.largest_free_bytes, occupancy.blocks),
        )

    def _peer_gone(self, peer: str) -> None:
        self._memory.unpark(peer)
        self._areas.unpark(peer)
        for channel in list(self._channels):
            if channel.worker_id == peer:
                channel.pair.peer_gone()

    # --- tensors ----------------------------------------------------------------------------------------------------------------------

    @property
    def arena(self) -> Arena:
        """Of the segment."""
        return self.memory.arena

    @property
    def device(self) -> DeviceArena | None:
        """What :meth:`device_arena` made."""
        return self.memory.device

    @property
    def place_timeout(self) -> float:
        """Seconds to wait for room in a full arena."""
        return self.memory.place_timeout

    def empty(
        self, shape: int | tuple[int, ...] | list[int], dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """A tensor of ``shape`` in shared memory, values undefined: write into it, and no call will copy it.

        ``device``: ``cuda`` for one in the device arena (:meth:`device_arena`); or a ``torch.device``, as ``x.device`` is. Its block is free again when the last view of it dies.
        Raises :class:`ArenaFull`, :class:`ArenaTooSmall`, :class:`BadInput`.
        """
        return self.memory.empty(shape, dtype, device=device)

    def device_arena(self, nbytes: int | str, device: str | torch.device = "cuda", *, cuda: Cuda | None = None) -> DeviceArena:
        """Allocate memory on a GPU, once, for ``client.empty(..., device="cuda")``: workers on this machine's GPUs see it too, by CUDA IPC.

        ``nbytes``: or a text like ``"512M"``. ``cuda``: another driver than NVIDIA's. A call with an input there has its results there. What
        you wrote on the current stream is waited for before a call is published. Raises :class:`CudaRefused`, :class:`BadInput`.
        """
        return self.memory.device_arena(nbytes, device, cuda=cuda)

    def copy_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in shared memory, for several calls to use."""
        return self.memory.copy_in(tensor)

    def holds(self, tensor: object) -> bool:
        """Whether ``tensor`` (or a NumPy array, or one that offers DLPack) lies in this client's arena, so that handing it over copies nothing."""
        return self.memory.holds(tensor)

    # --- channels -----------------------------------------------------------------------------------------------------------------------

    def channel(
        self,
        service: str | None = None,
        *,
        lane: str | None = None,
        doorbell: str | None = None,
        wait: float | None = None,
        worker: str | None = None,
    ) -> Channel:
        """Open a channel to a worker that offers ``service``, waiting ``wait`` seconds for one to come. What is not given: as the settings.

        Of several, the one with the fewest channels; ``worker``: the one of this name (``shmbroker status`` lists them).
        ``lane``: ``shm`` (queues in shared memory) or ``zmq`` (a socket); ``doorbell`` of lane shm: ``sem`` or ``poll``. ``auto`` takes the fastest
        that works at both ends. Raises :class:`NoSuchService`, :class:`Busy`, :class:`ChannelError`, :class:`BadInput`.
        """
        return self._channel(Wanted.of(service, lane, doorbell, wait, worker))

    def failover_channel(
        self,
        service: str | None = None,
        *,
        lane: str | None = None,
        doorbell: str | None = None,
        wait: float | None = None,
        patience: float | None = None,
    ) -> FailoverChannel:
        """:meth:`channel`, and when its worker dies or drains, another of the same service and identity takes over: calls go on.

        ``patience``: seconds to wait for one that can; then :class:`WorkerLost` is raised. Only for ops that may be run twice: functions of
        their inputs.
        """
        settings = current()
        service = settings.service if service is None else service
        patience = settings.failover if patience is None else seconds("patience", patience)
        return FailoverChannel(
            self.memory,
            service,
            lambda passed_over: self._channel(Wanted.of(service, lane, doorbell, 0.0 if passed_over else wait, None, passed_over)),
            patience,
        )

    def _channel(self, wanted: Wanted) -> Channel:
        self._check_open()
        with self._opener.opening():
            reachable = self._reachable()
            if reachable is self:
                return self._open(wanted)
        return reachable._channel(wanted)  # whose own closing ends it

    def _open(self, wanted: Wanted) -> Channel:
        """While it does, closing waits: what it opens is closed too."""
        index = self._areas.take()
        if index is None:
            parked = f", {self._areas.parked} of them closed over a call that still runs" if self._areas.parked else ""
            raise ChannelError(f"all {self._areas.count} channels of this client are open{parked}: close one, or connect(channels=...)")
        try:
            opened = self._opener.open_any(wanted, index)
        except BaseException:
            self._areas.give_back(index)
            raise
        worker, pair, answer = opened.worker, opened.pair, opened.answer
        channel = Channel(self._memory, pair, opened.requester, answer, worker, wanted.service, index, self.timeout, on_close=self._forget)
        with self._lock:
            self._channels.append(channel)
        log.info(
            "channel to %s (pid %d) for %r: lane %s, doorbell %s, control %s",
            worker.name,
            worker.process.pid,
            wanted.service,
            channel.lane,
            channel.doorbell,
            channel.control,
        )
        return channel

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Those that are open."""
        return (*self._channels, *(self._successor.channels if self._successor is not None else ()))

    def _reachable(self) -> Client:
        """Itself, or whoever took its place: memory that has lost its name cannot be given one, and nobody else could map it any more."""
        with self._joining:
            if self._successor is not None:
                return self._successor
            if self.segment.is_named():
                self._bell.ensure_named()
                return self
            log.warning("%s%s", without_a_name(self.segment), "" if self._again.keywords["trace"] is None else "; they are not traced")
            self._successor = self._again(trace=None)
            self._successor.memory.device = self.memory.device
            self.memory = self._successor.memory
            return self._successor

    def _forget(self, channel: Channel) -> None:
        """The channel is closed."""
        with self._lock:
            if channel in self._channels:
                self._channels.remove(channel)
                if os.getpid() == self._pid:
                    self._publisher.clear(channel.index)
                if channel.goes_on:
                    self._areas.park(channel.index, channel.worker_id)
                else:
                    self._areas.give_back(channel.index)

    # --- leaving ------------------------------------------------------------------------------------------------------------------------

    def disown(self) -> None:
        """In a forked child: nothing of this client is the child's to use."""
        self._unusable = f"this client belongs to process {self._pid}: connect() anew after a fork"
        self._memory.refuse(self._unusable)
        for channel in list(self._channels):
            channel.pair.disown(ChannelError(self._unusable))

    def close(self) -> None:
        """Close all channels and leave. Living tensors keep their memory, which has no name any more. A second time does nothing.

        Callable from any thread, while others call (their calls fail), and in a future's callback. In a finaliser it returns at once, and is done by a thread
        of its own. When something goes wrong, everything else is closed all the same, and then it is raised.
        """
        self._unusable = self._unusable or "the client is closed"
        self._memory.refuse(self._unusable)
        if os.getpid() != self._pid:
            open_clients.discard(self)
            return  # the parent's: sockets and threads are not ours to touch
        try:
            self._closing.close()
        finally:
            if self._closing.done:
                open_clients.discard(self)

    def _close_channels(self) -> None:
        for channel in list(self._channels):
            self._closing.add(channel.close)  # done next: each, whatever becomes of the others
        if self._successor is not None:
            self._closing.add(self._successor.close)

    def _give_up_bell(self) -> None:
        for step in self._bell.steps:
            self._closing.add(step)

    def _stop_link(self) -> None:
        if self._link is not None:
            self._link.stop()

    def _check_open(self) -> None:
        if self._unusable:
            raise ChannelError(self._unusable)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self._unusable or f"{len(self._channels)} of {self.segment.geometry.channel_count} channels open"
        return f"<Client {self.name!r} of instance {self.instance!r}: arena {self.arena.nbytes} bytes, {state}>"
