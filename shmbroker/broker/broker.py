"""The broker daemon: answers the requests of clients and workers until it is told to stop.

It is not on the path of a call: nothing here is waited for once a channel is open. It imports neither torch nor NumPy.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from types import FrameType

import posix_ipc
import zmq

from shmbroker.broker.limits import Limits
from shmbroker.broker.outdated_peers import OutdatedPeers
from shmbroker.broker.peers import Peer, Peers
from shmbroker.control import endpoint as endpoints
from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.instance_lock import InstanceLock
from shmbroker.control.liveness import age_of
from shmbroker.control.unix_responder import require_room, responder_at
from shmbroker.errors import BadInput, ProtocolMismatch, SharedMemoryFull, ShmBrokerError
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold
from shmbroker.memory.reaper import objects, unlink_all
from shmbroker.memory.segment import make_segment
from shmbroker.memory.stores import store
from shmbroker.systemd import notify
from shmbroker.version import __version__

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5

CLIENT_JOINS_FILES, WORKER_JOINS_FILES, HELLO_FILES = 7, 5, 3
"""Files that the broker has open for a moment at most while somebody joins, from each of the requests on that this takes."""

FAREWELL_SECONDS = 3.0
"""How long a private broker waits for those that its starter also started."""


class Broker:
    """Answers the requests of one instance's clients and workers. Who they are it asks :class:`Peers`, how much they may have :class:`Limits`.

    ``group``: id of the group that may share memory and sockets; -1 for the user alone. ``control`` and ``keys``: as of :meth:`Access.of`.
    """

    def __init__(
        self,
        instance: str,
        group: int = -1,
        until_exit: int = 0,
        *,
        control: str | None = None,
        keys: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.instance = names.check_instance(instance)
        store()  # what cannot be is told now, not to the first client
        self._limits = limits or Limits()
        self._gid = group
        self._mode = 0o660 if group >= 0 else 0o600
        self._epoch = secrets.token_hex(8)
        self._started = time.monotonic()
        self._stopping = False
        self._until_exit = until_exit
        self._handlers: dict[type, Callable[[bytes, m.AnyMessage], m.Message | None]] = {
            m.Hello: self._on_hello,
            m.Heartbeat: self._on_heartbeat,
            m.Goodbye: self._on_goodbye,
            m.MakeSegment: self._on_make_segment,
            m.MakeBell: self._on_make_bell,
            m.FindService: self._on_find_service,
            m.GetStatus: self._on_get_status,
        }
        self._owners: dict[str, m.ProcessId] = {}
        """By peer, the processes that segments were made for."""
        access = Access.of(self.instance, control, keys)
        path = endpoints.socket_path(self.instance)
        endpoints.make_private_dir(path.parent, group)
        self._lock = InstanceLock(path.with_suffix(".lock"), self.instance)
        self._socket_path = path
        self._outdated = OutdatedPeers(self.instance, path.parent)
        self._context = access.context()
        try:
            with endpoints.private_sockets(path.parent):
                self._responder = responder_at(self._context, access.endpoint, self._outdated.meet)
        except (zmq.ZMQError, OSError) as error:
            self._context.term()
            self._lock.release()
            why = os.strerror(error.errno or 0)
            raise BadInput(f"the broker cannot listen on {access.endpoint}: {why}; choose another --control") from None
        self._poller = zmq.Poller()
        self._poller.register(self._responder.pollable, zmq.POLLIN)
        self._peers = Peers(self.instance, path.parent, self._poller, self._responder.send, self._responder.connected)

    @property
    def endpoint(self) -> str:
        """Where the broker listens."""
        return self._responder.endpoint

    @property
    def reaped_objects(self) -> int:
        """Objects in shared memory unlinked so far, as nobody held them."""
        return self._peers.reaped_objects

    @property
    def reaped_bytes(self) -> int:
        """Their sizes."""
        return self._peers.reaped_bytes

    def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Run until SIGTERM or SIGINT, or until process ``until_exit`` ends. Segments of living clients stay."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous_fd = signal.set_wakeup_fd(wake_write)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._poller.register(wake_read, zmq.POLLIN)
        parent_fd = -1
        try:
            if self._until_exit:
                with contextlib.suppress(ProcessLookupError):
                    parent_fd = os.pidfd_open(self._until_exit)
                    self._poller.register(parent_fd, zmq.POLLIN)
                self._stopping = parent_fd < 0
            self._peers.reap("left by processes that died before")
            for name in objects(self.instance):
                log.info("%s is held by a living process: adopted", name.file)
            log.info("instance %s: listening on %s", self.instance, self.endpoint)
            ready()
            notify.ready(f"instance {self.instance} on {self.endpoint}")
            watchdog = notify.Watchdog.of_environment()
            while not self._stopping:
                if watchdog is not None:
                    watchdog.turning("control")
                events = dict(self._poller.poll(int(TICK_SECONDS * 1000)))
                if parent_fd in events:
                    break
                if wake_read in events:
                    os.read(wake_read, 64)
                self._responder.answer_waiting(self._handle)
                self._peers.look_after()
                self._outdated.look_after()
        finally:
            notify.stopping()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for fd in (wake_read, wake_write, parent_fd):
                if fd >= 0:
                    os.close(fd)
            self._close()

    def _close(self) -> None:
        self._peers.close()
        with contextlib.suppress(FileNotFoundError):
            self._socket_path.unlink()
        self._responder.close()
        self._context.term()
        if self._until_exit:
            self._leave_nothing()
        self._lock.release()
        if self._until_exit:
            with contextlib.suppress(OSError):
                self._socket_path.parent.rmdir()  # if nothing else is in it
        log.info("instance %s: stopped", self.instance)

    def _leave_nothing(self) -> None:
        """Of a private broker whose starter is gone: wait a moment for its other children, which end too, and tidy up after all, the living too."""
        until = time.monotonic() + FAREWELL_SECONDS
        while list(objects(self.instance)) and time.monotonic() < until:
            time.sleep(0.05)
            self._peers.reap("left by a process that died")
        unlink_all(self.instance)
        for path in self._socket_path.parent.glob(f"{self.instance}.*.sock"):  # of its workers
            path.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _handle(self, sender: bytes, message: m.AnyMessage) -> m.Message | None:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolMismatch(f"the broker takes no {type(message).__name__}")
        return handler(sender, message)

    # --- requests -----------------------------------------------------------------------------------------------------------------

    def _on_hello(self, sender: bytes, hello: m.AnyMessage) -> m.Message:
        assert isinstance(hello, m.Hello)
        _checked_id(hello.peer)
        if not all(text.isprintable() for text in (hello.role, hello.name, hello.version, hello.endpoint, hello.device, *hello.services)):
            raise ValueError("names are of printable characters")
        if hello.segment not in ("", names.segment_name(self.instance, hello.peer)):
            raise ValueError(f"{hello.segment!r} is not the segment that this broker makes for {hello.peer}")
        if not self._peers.knows(hello.peer):
            require_room(self._responder, HELLO_FILES)
        self._peers.join(sender, hello)
        if hello.segment:
            self._owners[hello.peer] = hello.process  # after a restart the broker learns it only so
        return m.Welcome(self._epoch)

    def _on_heartbeat(self, sender: bytes, beat: m.AnyMessage) -> m.Message:
        assert isinstance(beat, m.Heartbeat)
        return m.HeartbeatSeen(self._epoch, self._peers.heard(sender, beat.peer, beat.stats))

    def _on_goodbye(self, sender: bytes, goodbye: m.AnyMessage) -> None:
        assert isinstance(goodbye, m.Goodbye)
        self._peers.leave(sender, goodbye.peer)

    def _on_make_segment(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        assert isinstance(request, m.MakeSegment)
        name = names.segment_name(self.instance, _checked_id(request.peer))
        geometry = Geometry(request.arena_bytes, request.channel_count, request.depth)
        require_room(self._responder, CLIENT_JOINS_FILES)
        self._check_limits(request.process, geometry.total_bytes)
        pid = request.process.pid
        hold = make_segment(name, geometry, instance=self.instance, owner=request.peer, owner_pid=pid, mode=self._mode, gid=self._gid)
        self._owners[request.peer] = request.process
        self._peers.hold_until_hello(request.peer, request.process, hold)
        return m.Made(name)

    def _on_make_bell(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        assert isinstance(request, m.MakeBell)
        name = names.bell_name(self.instance, _checked_id(request.peer))
        require_room(self._responder, WORKER_JOINS_FILES)
        self._peers.hold_until_hello(request.peer, request.process, _make_bell(name, self._mode, self._gid))
        return m.Made(name)

    def _on_find_service(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        assert isinstance(request, m.FindService)
        peers = self._peers.known()
        workers = tuple(
            m.WorkerInfo(peer.hello.peer, peer.hello.name, peer.hello.process, peer.hello.endpoint, peer.hello.device)
            for peer in peers
            if request.service in peer.hello.services
        )
        services = sorted({service for peer in peers for service in peer.hello.services})
        return m.Found(workers, tuple(services))

    def _on_get_status(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        return self.status()

    def status(self) -> m.StatusReport:
        """All that the broker knows. Callable from any thread."""
        now = time.monotonic()
        space = os.statvfs(names.SHM_DIR)
        return m.StatusReport(
            instance=self.instance,
            endpoint=self.endpoint,
            pid=os.getpid(),
            version=__version__,
            uptime_seconds=now - self._started,
            shm_free_bytes=space.f_bavail * space.f_frsize,
            peers=tuple(_status_of(peer, now) for peer in self._peers.known()),
            outdated=self._outdated.known(),
        )

    # --- limits -------------------------------------------------------------------------------------------------------------------

    def _check_limits(self, process: m.ProcessId, asked: int) -> None:
        try:
            self._limits.check(process.pid, asked, *self._granted(process))
        except ShmBrokerError:
            self._peers.reap("held by nobody")  # what the dead left a moment ago counts no more
            self._limits.check(process.pid, asked, *self._granted(process))

    def _granted(self, process: m.ProcessId) -> tuple[int, int]:
        """Bytes of the segments of ``process``, and how many segments there are in all."""
        segments = [name for name in objects(self.instance) if name.kind == names.SEGMENT]
        self._owners = {name.owner: self._owners[name.owner] for name in segments if name.owner in self._owners}
        nbytes = sum(_file_bytes(name.file) for name in segments if self._owners.get(name.owner) == process)
        nameless = {peer.hello.peer for peer in self._peers.known() if peer.hello.segment} - {name.owner for name in segments}
        return nbytes, len(segments) + len(nameless)


def _checked_id(peer: str) -> str:
    if names.parse(f"shmbroker.x.segment.{peer}") is None:
        raise ValueError(f"{peer!r} is not an id: 16 hexadecimal digits")
    return peer


def _file_bytes(segment: str) -> int:
    if not segment:
        return 0
    try:
        return os.stat(store().path(f"/{segment.lstrip('/')}")).st_size
    except OSError:
        return 0


def _status_of(peer: Peer, now: float) -> m.PeerStatus:
    hello = peer.hello
    return m.PeerStatus(
        role=hello.role,
        peer=hello.peer,
        name=hello.name,
        pid=hello.process.pid,
        services=hello.services,
        device=hello.device,
        segment=hello.segment,
        segment_bytes=_file_bytes(hello.segment),
        age_seconds=age_of(hello.process),
        silent_seconds=now - peer.heard,
        stats=peer.stats,
        version=hello.version,
        namespace=hello.process.namespace,
    )


def _make_bell(name: str, mode: int, gid: int) -> Hold:
    """A semaphore of that name, held from its making on. Raises :class:`SharedMemoryFull`."""
    try:
        posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=mode, initial_value=0).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        space = os.statvfs(names.SHM_DIR)
        raise SharedMemoryFull(
            f"{names.SHM_DIR} is full: a page for a doorbell was asked for, {space.f_bavail * space.f_frsize} of "
            f"{space.f_blocks * space.f_frsize} bytes are free; run 'shmbroker gc', remove what fills it, or enlarge it (docker: --shm-size)"
        ) from None
    path = names.bell_path(name)
    os.chmod(path, mode)
    if gid >= 0:
        os.chown(path, -1, gid)
    return Hold.on(path)
