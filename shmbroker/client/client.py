"""A client: one segment of its own, from which it places tensors, and channels to workers."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from types import TracebackType

import torch
from msgspec import UNSET, UnsetType

from shmbroker.arena.arena import Arena
from shmbroker.arena.cuda_runtime import Cuda, CudaRuntime
from shmbroker.arena.device_arena import DeviceArena
from shmbroker.call.client_memory import as_tensor
from shmbroker.call.completions import CompletionLoop
from shmbroker.client.channel import Channel
from shmbroker.client.failover import FailoverChannel
from shmbroker.client.publisher import Publisher
from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.broker_link import BrokerLink
from shmbroker.control.joining import ask_broker, peer_name, resolve_instance
from shmbroker.control.liveness import Watch, this_process
from shmbroker.control.sockets import Requester
from shmbroker.errors import BadInput, ChannelError, NoSuchService, ShmBrokerError, WorkerLost
from shmbroker.lane.doorbell import PollingBell, SemaphoreBell, shm_lane_supported
from shmbroker.lane.shm_lane import CLIENT_SLEEPING, ShmClientLane, clear_channel
from shmbroker.lane.waiter import Waiter
from shmbroker.lane.zmq_lane import ZmqClientLane
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold, unlink_own
from shmbroker.memory.segment import Segment
from shmbroker.memory.stores import store
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.settings.load import current
from shmbroker.settings.sizes import parse_bytes
from shmbroker.trace.writer import Trace
from shmbroker.version import __version__

log = logging.getLogger(__name__)

_SERVICE_POLL_SECONDS = 0.05

LOOK_SECONDS = 25e-6
"""How long whoever waits for a completion looks for it before deadlines and the doorbell are thought of."""

_open: weakref.WeakSet[Client] = weakref.WeakSet()


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
    limit. ``place_timeout``: seconds to wait for room in a full arena. ``spin``: seconds to look for a completion before sleeping; 0 to sleep
    at once. ``channels``: how many may be open. ``depth``: calls in flight on each, a power of two. ``trace``: a file that tells of every call
    (docs/traces.md).

    The broker is found by unix socket, or by $SHMBROKER_CONTROL and $SHMBROKER_KEYS (``shmbroker serve --control``).

    Raises :class:`BrokerUnreachable`, :class:`SharedMemoryFull`, :class:`QuotaExceeded`, :class:`TooManyClients`, :class:`BadInput`.
    """
    settings = current()
    return Client(
        resolve_instance(instance),
        arena_bytes=layout.round_up(parse_bytes(settings.arena if arena is None else arena), layout.PAGE),
        name=peer_name(name),
        timeout=settings.timeout if timeout is UNSET else timeout,
        place_timeout=settings.place_timeout if place_timeout is None else place_timeout,
        spin=settings.spin * 1e-6 if spin is None else spin,
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
            geometry = Geometry(arena_bytes, channel_count, depth)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if not spin >= 0:
            raise BadInput(f"spin {spin!r} must be a number of seconds, 0 or more")
        self.instance = instance
        self.name = name
        self.id = names.new_id()
        self.timeout = timeout
        self.place_timeout = place_timeout
        self._pid = os.getpid()
        self._unusable = ""
        """Why, in words for its user."""
        self._channels: list[Channel] = []
        self._free_areas = list(range(geometry.channel_count))
        self._lock = threading.Lock()
        access = Access.of(instance)
        self._undo = contextlib.ExitStack()
        self._trace: Trace | None = None
        with contextlib.ExitStack() as stack:
            if trace is not None:
                self._trace = Trace(trace, f"client {name}")
                stack.callback(self._trace.close)
            self._context = access.context()
            stack.callback(self._context.term)
            self._requester = Requester(self._context, access.endpoint)
            stack.callback(self._requester.close)
            self._link: BrokerLink | None = None
            # Undone after the holds are released, so that the broker, on our Goodbye, finds nothing held.
            stack.callback(self._stop_link)
            request = m.MakeSegment(self.id, this_process(), geometry.arena_bytes, geometry.channel_count, geometry.depth)
            made = ask_broker(self._requester, request, m.Made, instance, timeout=_reserving_seconds(geometry))
            # fault: before segment held
            self._segment = Segment.attach(made.name, hold=True)
            # fault: after segment held
            stack.callback(store().unlink_own, made.name)
            stack.callback(self._segment.close)
            bell = ask_broker(self._requester, m.MakeBell(self.id, this_process()), m.Made, instance)
            self._bell_name = bell.name
            bell_hold = Hold.on(names.bell_path(bell.name))
            stack.callback(unlink_own, names.bell_path(bell.name))
            stack.callback(bell_hold.release)
            self._bell = SemaphoreBell(bell.name)
            stack.callback(self._bell.close)
            self.arena = Arena(self._segment)
            stack.callback(self.arena.close)
            self._publisher = Publisher(self._segment, self.arena, lambda: list(self._channels))
            stack.callback(self._publisher.close)
            self.device: DeviceArena | None = None
            stack.callback(self._close_device)
            self._spin = spin
            self._loops: dict[Doorbell, CompletionLoop] = {}
            self._link = BrokerLink(self._context, access.endpoint, self._hello, self._stats, self._peer_gone, self._publisher.publish)
            self._link.start()
            self._undo = stack.pop_all()
        _open.add(self)

    # --- joining ----------------------------------------------------------------------------------------------------------------------

    def _hello(self) -> m.Hello:
        return m.Hello(role="client", peer=self.id, process=this_process(), name=self.name, version=__version__, segment=self._segment.name)

    def _stats(self) -> m.PeerStats:
        occupancy = self.arena.occupancy()
        channels = tuple(channel.info() for channel in list(self._channels))
        return m.PeerStats(
            calls=sum(channel.calls for channel in channels),
            channels=channels,
            arena=m.ArenaInfo(occupancy.total_bytes, occupancy.held_bytes, occupancy.largest_free_bytes, occupancy.blocks),
        )

    def _peer_gone(self, peer: str) -> None:
        for channel in list(self._channels):
            if channel.worker_id == peer:
                channel.peer_gone()

    # --- tensors ----------------------------------------------------------------------------------------------------------------------

    def empty(
        self, shape: int | tuple[int, ...] | list[int], dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """A tensor of ``shape`` in shared memory, values undefined: write into it, and no call will copy it.

        ``device``: ``cuda`` for one in the device arena (:meth:`device_arena`). Its block is free again when the last view of it dies.
        Raises :class:`ArenaFull`, :class:`ArenaTooSmall`, :class:`BadInput`.
        """
        self._check_open()
        arena: Arena | DeviceArena = self.arena if device == "cpu" else self._device_for(device)
        return arena.empty((shape,) if isinstance(shape, int) else tuple(shape), dtype, self.place_timeout)

    def device_arena(self, nbytes: int | str, device: str = "cuda", *, cuda: Cuda | None = None) -> DeviceArena:
        """Allocate memory on a GPU, once, for ``client.empty(..., device="cuda")``: workers on this machine's GPUs see it too, by CUDA IPC.

        ``nbytes``: or a text like ``"512M"``. ``cuda``: another driver than NVIDIA's. A call with an input there has its results there. What
        you wrote on the current stream is waited for before a call is published. Raises :class:`CudaRefused`, :class:`BadInput`.
        """
        self._check_open()
        if self.device is not None:
            raise BadInput(f"this client has a device arena of {self.device.nbytes} bytes already: a client has one")
        size = layout.round_up(parse_bytes(nbytes), layout.PAGE)
        if not size > 0:
            raise BadInput("a device arena has at least one byte")
        self.device = DeviceArena(cuda or CudaRuntime.of(device), size)
        return self.device

    def _device_for(self, device: str | torch.device) -> DeviceArena:
        if self.device is None:
            raise BadInput(f"client.empty(device={str(device)!r}) needs memory there: call client.device_arena(nbytes) first")
        if torch.device(device).type != "cuda":
            raise BadInput(f"device {str(device)!r}: tensors lie on the cpu, or in the device arena (cuda)")
        return self.device

    def device_written(self) -> None:
        """Wait until what was written to the device arena on the current stream is there, for a worker to read."""
        if self.device is not None:
            self.device.written()

    def _close_device(self) -> None:
        if self.device is not None:
            self.device.close()

    def copy_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in shared memory, for several calls to use."""
        self._check_open()
        return self.arena.copy_in(as_tensor(tensor), self.place_timeout)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in this client's arena, so that handing it over copies nothing."""
        if not isinstance(tensor, torch.Tensor):
            return False
        return self.arena.find(tensor) is not None or (self.device is not None and self.device.find(tensor) is not None)

    # --- channels -----------------------------------------------------------------------------------------------------------------------

    def channel(
        self, service: str | None = None, *, lane: str | None = None, doorbell: str | None = None, wait: float | None = None
    ) -> Channel:
        """Open a channel to a worker that offers ``service``, waiting ``wait`` seconds for one to come. What is not given: as the settings.

        ``lane``: ``shm`` (queues in shared memory) or ``zmq`` (a socket); ``doorbell`` of lane shm: ``sem`` or ``poll``. ``auto`` takes the fastest
        that works at both ends. Raises :class:`NoSuchService`, :class:`ChannelError`, :class:`BadInput`.
        """
        return self._channel(service, lane, doorbell, wait, frozenset())

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
        patience = settings.failover if patience is None else patience
        if not patience >= 0:
            raise BadInput(f"patience {patience!r} must be a number of seconds, 0 or more")
        return FailoverChannel(
            self,
            service,
            lambda passed_over: self._channel(service, lane, doorbell, 0.0 if passed_over else wait, passed_over),
            patience,
        )

    def _channel(
        self, service: str | None, lane: str | None, doorbell: str | None, wait: float | None, passed_over: frozenset[str]
    ) -> Channel:
        self._check_open()
        settings = current()
        service = settings.service if service is None else service
        lane, doorbell = settings.lane if lane is None else lane, settings.doorbell if doorbell is None else doorbell
        wait = settings.wait if wait is None else wait
        if not isinstance(service, str) or not service:
            raise BadInput(f"a service is named by a string, not by {service!r}")
        wanted_lane, wanted_doorbell = _choose(lane, doorbell)
        worker = self._find(service, wait, passed_over)
        with self._lock:
            if not self._free_areas:
                raise ChannelError(f"all {len(self._channels)} channels of this client are open: close one, or connect(channels=...)")
            index = self._free_areas.pop()
        try:
            channel = self._open_channel(service, worker, wanted_lane, wanted_doorbell, index)
        except BaseException:
            self._free_areas.append(index)
            raise
        with self._lock:
            self._channels.append(channel)
        log.info(
            "channel to %s (pid %d) for %r: lane %s, doorbell %s, control %s",
            worker.name,
            worker.process.pid,
            service,
            channel.lane,
            channel.doorbell,
            channel.control,
        )
        return channel

    def _find(self, service: str, wait: float, passed_over: frozenset[str]) -> m.WorkerInfo:
        until = time.monotonic() + wait
        while True:
            with self._lock:
                found = ask_broker(self._requester, m.FindService(service), m.Found, self.instance)
            for worker in found.workers:
                if worker.peer not in passed_over:
                    return worker
            if time.monotonic() >= until:
                there = ", ".join(map(repr, found.services)) or "none at all"
                raise NoSuchService(
                    f"no worker offers service {service!r} on instance {self.instance!r} (offered: {there}) and none came within {wait:g} s: "
                    "start one, e.g. 'gpu-worker serve --model DIR'"
                )
            time.sleep(_SERVICE_POLL_SECONDS)

    def _open_channel(self, service: str, worker: m.WorkerInfo, lane: Lane, doorbell: Doorbell, index: int) -> Channel:
        clear_channel(self._segment, index)
        with contextlib.ExitStack() as stack:
            requester = Requester(self._context, worker.endpoint)
            stack.callback(requester.close)
            opening = m.OpenChannel(
                client=self.id,
                client_name=self.name,
                process=this_process(),
                segment=self._segment.name,
                index=index,
                service=service,
                lane=lane.value,
                doorbell=doorbell.value,
                bell=self._bell_name,
            )
            watch = Watch(worker.process)
            try:
                # fault: before channel opened
                opened = requester.ask(opening, m.ChannelOpened, alive=watch.alive)
                # fault: after channel opened
                end: ShmClientLane | ZmqClientLane
                if Lane(opened.lane) is Lane.SHM:
                    worker_bell = SemaphoreBell(opened.bell) if Doorbell(opened.doorbell) is Doorbell.SEM else PollingBell()
                    end = ShmClientLane(self._segment, index, worker_bell)
                    loop = self._loop(Doorbell(opened.doorbell))
                else:
                    zmq_end = end = ZmqClientLane(self._context, opened.endpoint, opened.token, self._segment.geometry.depth)
                    loop = CompletionLoop(lambda ready, receivers, seconds: zmq_end.wait(seconds))
            except TimeoutError as error:
                who = f"worker {worker.name!r} (pid {worker.process.pid})"
                if not watch.alive():
                    raise WorkerLost(f"{who} died while a channel to it was opened") from None
                raise ChannelError(f"{who} does not answer: {error}") from None
            except ValueError as error:
                if isinstance(error, ShmBrokerError):
                    raise
                raise ChannelError(f"worker {worker.name!r} (pid {worker.process.pid}) answered what cannot be used: {error}") from None
            finally:
                watch.close()
            stack.pop_all()
            if self._trace is not None:
                from shmbroker.call.traced_queue_pair import TracedChannel

                return TracedChannel(self._trace, self, service, worker, opened, requester, end, loop, index)
            return Channel(self, service, worker, opened, requester, end, loop, index)

    def _loop(self, doorbell: Doorbell) -> CompletionLoop:
        """The waiters on this process's doorbell: one loop for all channels of the shm lane that use it."""
        with self._lock:
            if doorbell not in self._loops:
                bell = self._bell if doorbell is Doorbell.SEM else PollingBell()
                waiter = Waiter(bell, self._spin, [(self._segment.words, CLIENT_SLEEPING // 8)])
                self._loops[doorbell] = CompletionLoop(waiter.wait, min(self._spin, LOOK_SECONDS))
            return self._loops[doorbell]

    def forget(self, channel: Channel) -> None:
        """For :meth:`Channel.close`."""
        with self._lock:
            if channel in self._channels:
                self._channels.remove(channel)
                if os.getpid() == self._pid:
                    self._publisher.clear(channel.index)
                self._free_areas.append(channel.index)

    # --- leaving ------------------------------------------------------------------------------------------------------------------------

    def disown(self) -> None:
        """In a forked child: nothing of this client is the child's to use."""
        self._unusable = f"this client belongs to process {self._pid}: connect() anew after a fork"
        for channel in list(self._channels):
            channel.disown(ChannelError(self._unusable))

    def close(self) -> None:
        """Close all channels and leave. Living tensors keep their memory, which has no name any more. A second time does nothing."""
        if self not in _open:
            return
        _open.discard(self)
        self._unusable = self._unusable or "the client is closed"
        if os.getpid() != self._pid:
            return  # the parent's: sockets and threads are not ours to touch
        for channel in list(self._channels):
            channel.close()
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()
        self._undo.close()

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
        return f"<Client {self.name!r} of instance {self.instance!r}, arena {self.arena.nbytes} bytes>"


def _choose(lane: str, doorbell: str) -> tuple[Lane, Doorbell]:
    """Lane and doorbell to ask for."""
    if lane not in ("auto", "shm", "zmq"):
        raise BadInput(f"lane {lane!r} is not known; there are: auto, shm, zmq")
    if doorbell not in ("auto", "sem", "poll"):
        raise BadInput(f"doorbell {doorbell!r} is not known; there are: auto, sem, poll")
    if lane == "zmq" or (lane == "auto" and not shm_lane_supported()):
        if doorbell != "auto":
            raise BadInput(f"doorbell {doorbell!r} belongs to lane shm; lane zmq has its socket")
        return Lane.ZMQ, Doorbell.SOCKET
    if not shm_lane_supported():
        raise BadInput("lane shm needs x86-64, where plain stores are seen in order: use lane zmq")
    return Lane.SHM, Doorbell.SEM if doorbell == "auto" else Doorbell(doorbell)


def _reserving_seconds(geometry: Geometry) -> float:
    """How long making a segment may take: every page is zeroed, at 1 GiB/s or better, on top of the usual patience."""
    return 5.0 + geometry.total_bytes / 2**30


def _disown_all() -> None:
    for client in list(_open):
        client.disown()


os.register_at_fork(after_in_child=_disown_all)


def _close_all() -> None:
    for client in list(_open):
        try:
            client.close()
        except (ShmBrokerError, OSError) as error:
            log.debug("closing at exit: %s", error)


atexit.register(_close_all)
