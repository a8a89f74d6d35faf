"""The broker daemon: makes segments and doorbells, introduces peers, watches processes, reaps what the dead leave behind.

It is not on the path of a call: nothing here is waited for once a channel is open. It imports neither torch nor NumPy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import posix_ipc
import zmq

from shmbroker.broker.limits import Limits
from shmbroker.control import endpoint as endpoints
from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.liveness import Watch, age_of
from shmbroker.control.sockets import Responder
from shmbroker.errors import BadInput, InstanceInUse, ProtocolMismatch, SharedMemoryFull, ShmBrokerError
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold, is_held
from shmbroker.memory.reaper import objects, reap
from shmbroker.memory.segment import make_segment
from shmbroker.memory.stores import place
from shmbroker.systemd import notify
from shmbroker.version import __version__

log = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
"""A peer that cannot be watched by pidfd (another pid namespace) is taken for gone after so long without a heartbeat."""

HANDOVER_SECONDS = 30.0
"""How long the broker holds an object that it made until its owner does."""

TICK_SECONDS = 0.5

FAREWELL_SECONDS = 3.0
"""How long a private broker waits for those that its starter also started."""

SWEEP_SECONDS = 1.0
"""How often everything unheld is reaped, also what nobody announced (0.1 ms: a listing of one folder). What the dead leave is to
be gone within 2 s."""


@dataclass(slots=True)
class Peer:
    """A process that said Hello."""

    hello: m.Hello
    sender: bytes
    """The connection that it said Hello on: no other speaks for it."""
    watch: Watch
    heard: float
    stats: m.PeerStats = field(default_factory=m.PeerStats)
    holds: list[Hold] = field(default_factory=list)
    """Of objects that it cannot hold itself (H4)."""


@dataclass(slots=True)
class _Handover:
    """Objects made for a peer that has not said Hello yet."""

    holds: list[Hold]
    since: float
    watch: Watch


class Broker:
    """One broker of one instance. ``group``: id of the group that may share memory and sockets; -1 for the user alone.

    ``control`` and ``keys``: as of :meth:`Access.of`.
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
        place()  # what cannot be is told now, not to the first client
        self._limits = limits or Limits()
        self.reaped_objects = 0
        self.reaped_bytes = 0
        self._gid = group
        self._mode = 0o660 if group >= 0 else 0o600
        self._epoch = secrets.token_hex(8)
        self._started = time.monotonic()
        self._peers: dict[str, Peer] = {}
        self._handovers: dict[str, _Handover] = {}
        self._next_sweep = 0.0
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
        self._lock = _take_instance(path.with_suffix(".lock"), self.instance)
        self._socket_path = path
        self._context = access.context()
        try:
            with endpoints.private_sockets(path.parent):
                self._responder = Responder(self._context, access.endpoint)
        except zmq.ZMQError as error:
            self._context.term()
            os.close(self._lock)
            why = os.strerror(error.errno or 0)
            raise BadInput(f"the broker cannot listen on {access.endpoint}: {why}; choose another --control") from None
        self._poller = zmq.Poller()
        self._poller.register(self._responder.socket, zmq.POLLIN)

    @property
    def endpoint(self) -> str:
        """Where the broker listens."""
        return self._responder.endpoint

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
            self._reap("left by processes that died before")
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
                self._look_after_peers()
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
        for peer in self._peers.values():
            peer.watch.close()
        for handover in self._handovers.values():
            self._end(handover)
        self._reap("never taken over")
        with contextlib.suppress(FileNotFoundError):
            self._socket_path.unlink()
        self._responder.close()
        self._context.term()
        if self._until_exit:
            self._leave_nothing()
        # Else the lock file stays: removing it would let two brokers lock two files of one name.
        os.close(self._lock)
        log.info("instance %s: stopped", self.instance)

    def _leave_nothing(self) -> None:
        """Of a private broker whose starter is gone: wait a moment for its other children, which end too, and tidy up after all."""
        until = time.monotonic() + FAREWELL_SECONDS
        while list(objects(self.instance)) and time.monotonic() < until:
            time.sleep(0.05)
            self._reap("left by a process that died")
        with contextlib.suppress(OSError):
            self._socket_path.with_suffix(".lock").unlink()
            self._socket_path.parent.rmdir()  # if nothing else is in it

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
        known = self._peers.get(hello.peer)
        if known is not None:
            if known.sender != sender and known.watch.alive():
                raise ValueError(f"{hello.peer} is somebody else, who lives")
            del self._peers[hello.peer]
            self._unwatch(known)
        now = time.monotonic()
        watch = Watch(hello.process)
        if hello.segment:
            self._owners[hello.peer] = hello.process  # after a restart the broker learns it only so
        self._peers[hello.peer] = Peer(hello, sender, watch, now)
        if watch.fd >= 0:
            self._poller.register(watch.fd, zmq.POLLIN)
        handover = self._handovers.pop(hello.peer, None)
        if handover is not None:
            self._end(handover)
        self._hold_for(self._peers[hello.peer])
        if known is None:
            log.info(
                "%s %s (%s, pid %d) joined%s",
                hello.role,
                hello.name,
                hello.peer,
                hello.process.pid,
                f", offers {', '.join(hello.services)} on {hello.endpoint}" if hello.services else "",
            )
        return m.Welcome(self.instance, self._epoch, __version__)

    def _on_heartbeat(self, sender: bytes, beat: m.AnyMessage) -> m.Message:
        assert isinstance(beat, m.Heartbeat)
        peer = self._peers.get(beat.peer)
        if peer is None or peer.sender != sender:
            return m.HeartbeatSeen(self._epoch, False)
        peer.heard = time.monotonic()
        peer.stats = beat.stats
        return m.HeartbeatSeen(self._epoch, True)

    def _on_goodbye(self, sender: bytes, goodbye: m.AnyMessage) -> None:
        assert isinstance(goodbye, m.Goodbye)
        peer = self._peers.get(goodbye.peer)
        if peer is not None and peer.sender == sender:
            self._remove(goodbye.peer, "left")

    def _on_make_segment(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        assert isinstance(request, m.MakeSegment)
        name = names.segment_name(self.instance, _checked_id(request.peer))
        geometry = Geometry(request.arena_bytes, request.channel_count, request.depth)
        self._check_limits(request.process, geometry.total_bytes)
        pid = request.process.pid
        hold = make_segment(name, geometry, instance=self.instance, owner=request.peer, owner_pid=pid, mode=self._mode, gid=self._gid)
        self._owners[request.peer] = request.process
        self._hold_until_hello(request.peer, request.process, hold)
        return m.Made(name)

    def _on_make_bell(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        assert isinstance(request, m.MakeBell)
        name = names.bell_name(self.instance, _checked_id(request.peer))
        try:
            posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=self._mode, initial_value=0).close()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            space = os.statvfs(names.SHM_DIR)
            raise SharedMemoryFull(
                f"{names.SHM_DIR} is full: a page for a doorbell was asked for, {space.f_bavail * space.f_frsize} of "
                f"{space.f_blocks * space.f_frsize} bytes are free; run 'shmbroker gc', remove what fills it, or enlarge it (docker: --shm-size)"
            ) from None
        path = names.bell_path(name)
        os.chmod(path, self._mode)
        if self._gid >= 0:
            os.chown(path, -1, self._gid)
        self._hold_until_hello(request.peer, request.process, Hold.on(path))
        return m.Made(name)

    def _on_find_service(self, sender: bytes, request: m.AnyMessage) -> m.Message:
        assert isinstance(request, m.FindService)
        workers = tuple(
            m.WorkerInfo(peer.hello.peer, peer.hello.name, peer.hello.process, peer.hello.endpoint, peer.hello.device)
            for peer in self._peers.values()
            if request.service in peer.hello.services
        )
        services = sorted({service for peer in self._peers.values() for service in peer.hello.services})
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
            peers=tuple(
                m.PeerStatus(
                    role=peer.hello.role,
                    peer=peer.hello.peer,
                    name=peer.hello.name,
                    pid=peer.hello.process.pid,
                    services=peer.hello.services,
                    device=peer.hello.device,
                    segment=peer.hello.segment,
                    segment_bytes=_file_bytes(peer.hello.segment),
                    age_seconds=age_of(peer.hello.process),
                    silent_seconds=now - peer.heard,
                    stats=peer.stats,
                    version=peer.hello.version,
                    namespace=peer.hello.process.namespace,
                )
                for peer in list(self._peers.values())
            ),
        )

    # --- objects and processes ----------------------------------------------------------------------------------------------------

    def _check_limits(self, process: m.ProcessId, asked: int) -> None:
        try:
            self._limits.check(process.pid, asked, *self._granted(process))
        except ShmBrokerError:
            self._reap("held by nobody")  # what the dead left a moment ago counts no more
            self._limits.check(process.pid, asked, *self._granted(process))

    def _granted(self, process: m.ProcessId) -> tuple[int, int]:
        """Bytes of the segments of ``process``, and how many segments there are in all."""
        segments = [name for name in objects(self.instance) if name.kind == names.SEGMENT]
        self._owners = {name.owner: self._owners[name.owner] for name in segments if name.owner in self._owners}
        return sum(_file_bytes(name.file) for name in segments if self._owners.get(name.owner) == process), len(segments)

    def _hold_until_hello(self, owner: str, process: m.ProcessId, hold: Hold) -> None:
        handover = self._handovers.get(owner)
        if handover is None:
            handover = self._handovers[owner] = _Handover([], time.monotonic(), Watch(process))
        handover.holds.append(hold)

    @staticmethod
    def _end(handover: _Handover) -> None:
        handover.watch.close()
        for hold in handover.holds:
            hold.release()

    def _look_after_peers(self) -> None:
        now = time.monotonic()
        for peer_id, peer in list(self._peers.items()):
            if not peer.watch.alive():
                self._remove(peer_id, "died")
            elif peer.watch.fd < 0 and now - peer.heard > SILENT_SECONDS:
                self._remove(peer_id, f"was silent for {SILENT_SECONDS:g} s")
        for owner, handover in list(self._handovers.items()):
            if now - handover.since > HANDOVER_SECONDS or not handover.watch.alive():
                del self._handovers[owner]
                self._end(handover)
                self._reap("never taken over", owner)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._reap("held by nobody")

    def _hold_for(self, peer: Peer) -> None:
        """Hold what the peer has and cannot hold itself, so that it is not reaped under it (H4)."""
        paths = [names.bell_path(names.bell_name(self.instance, peer.hello.peer))]
        if peer.hello.segment:
            paths.append(place().path(peer.hello.segment))
        for path in paths:
            if os.path.exists(path) and not is_held(path):
                with contextlib.suppress(OSError):
                    peer.holds.append(Hold.on(path))
                    log.info(
                        "%s %s cannot lock %s where this broker sees it: held for it while it lives", peer.hello.role, peer.hello.name, path
                    )

    def _unwatch(self, peer: Peer) -> None:
        for hold in peer.holds:
            hold.release()
        if peer.watch.fd >= 0:
            self._poller.unregister(peer.watch.fd)
        peer.watch.close()

    def _remove(self, peer_id: str, why: str) -> None:
        peer = self._peers.pop(peer_id)
        self._unwatch(peer)
        log.info("%s %s (%s, pid %d) %s", peer.hello.role, peer.hello.name, peer_id, peer.hello.process.pid, why)
        self._reap(f"of {peer_id}, which {why}", peer_id)
        for other in self._peers.values():
            self._responder.send(other.sender, m.PeerGone(peer_id))

    def _reap(self, why: str, owner: str | None = None) -> None:
        for reaped in reap(self.instance, owner):
            self.reaped_objects += 1
            self.reaped_bytes += reaped.nbytes
            log.info("reaped %s (%d bytes), %s", reaped.name.file, reaped.nbytes, why)
        alive = {name.owner for name in objects(self.instance)}
        for peer_id, path in endpoints.worker_sockets(self._socket_path.parent, self.instance):
            if peer_id not in alive:
                with contextlib.suppress(OSError):
                    path.unlink()


def _checked_id(peer: str) -> str:
    if names.parse(f"shmbroker.x.segment.{peer}") is None:
        raise ValueError(f"{peer!r} is not an id: 16 hexadecimal digits")
    return peer


def _file_bytes(segment: str) -> int:
    if not segment:
        return 0
    try:
        return os.stat(place().path(f"/{segment.lstrip('/')}")).st_size
    except OSError:
        return 0


def _take_instance(path: Path, instance: str) -> int:
    """Lock the instance for life. Two brokers on one socket would steal each other's clients without a word."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode("ascii", "replace").strip()
        os.close(fd)
        raise InstanceInUse(
            f"a broker already serves instance {instance!r} (pid {pid}): use it, stop it, or choose another --instance"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd
