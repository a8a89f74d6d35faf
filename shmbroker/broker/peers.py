"""The processes that a broker knows, from their Hello to their end.

What was made for a process is held for it until it says Hello, what it cannot lock itself is held for it while it lives (H4), and what nobody holds
is reaped: at the end of each process, and once a second what nobody announced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from shmbroker.control import endpoint as endpoints
from shmbroker.control import messages as m
from shmbroker.control.liveness import Watch
from shmbroker.memory import names
from shmbroker.memory.hold import Hold, HoldWatch, is_surely_held
from shmbroker.memory.open_files import is_exhaustion
from shmbroker.memory.reaper import objects, reap
from shmbroker.memory.stores import store

log = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
"""After so long without a heartbeat a peer that can be watched neither by its pid nor by its hold is gone if its connection is closed too, which the
kernel does at its end: it would have come back on another one by now. Silence alone says nothing."""

HANDOVER_SECONDS = 30.0
"""How long the broker holds an object that it made until its owner does."""

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
    """When it last said something, by the monotonic clock."""
    stats: m.PeerStats = field(default_factory=m.PeerStats)
    holds: list[Hold] = field(default_factory=list)
    """Of objects that it cannot hold itself (H4)."""


@dataclass(slots=True)
class _Handover:
    """Objects made for a peer that has not said Hello yet."""

    holds: list[Hold]
    since: float
    watch: Watch

    def end(self) -> None:
        """Hold them no longer."""
        self.watch.close()
        for hold in self.holds:
            hold.release()


class Peers:
    """Watches the processes of one instance, and reaps what they leave. Used by one thread, but for :meth:`known`."""

    def __init__(
        self,
        instance: str,
        sockets: Path,
        poller: zmq.Poller,
        send: Callable[[bytes, m.Message], None],
        connected: Callable[[bytes], bool],
    ) -> None:
        """``sockets``: the folder of the workers' sockets. ``poller``: wakes when a peer ends.

        ``send``: a message to a peer's connection. ``connected``: whether a connection is still open.
        """
        self.reaped_objects = 0
        """Unlinked so far, as nobody held them."""
        self.reaped_bytes = 0
        self._instance = instance
        self._sockets = sockets
        self._poller = poller
        self._send = send
        self._connected = connected
        self._peers: dict[str, Peer] = {}
        self._handovers: dict[str, _Handover] = {}
        self._next_sweep = 0.0

    def known(self) -> list[Peer]:
        """All that said Hello, longest known first. Callable from any thread."""
        return list(self._peers.values())

    def knows(self, peer_id: str) -> bool:
        """Whether that peer has said Hello."""
        return peer_id in self._peers

    def join(self, sender: bytes, hello: m.Hello) -> None:
        """Know the process that said ``hello`` on connection ``sender``. Raises ValueError when its id is another's, who lives."""
        known = self._peers.get(hello.peer)
        if known is not None:
            if known.sender != sender and known.watch.alive() and not self._came_back(known, hello):
                raise ValueError(f"{hello.peer} is somebody else, who lives")
            del self._peers[hello.peer]
            self._unwatch(known)
        handover = self._handovers.pop(hello.peer, None)
        if handover is not None:
            handover.end()  # first: from now on only the peer itself may hold what is its own
        peer = Peer(hello, sender, self._watch(hello), time.monotonic())
        self._peers[hello.peer] = peer
        if peer.watch.fd >= 0:
            self._poller.register(peer.watch.fd, zmq.POLLIN)
        self._hold_for(peer)
        if known is None:
            log.info(
                "%s %s (%s, pid %d) joined%s",
                hello.role,
                hello.name,
                hello.peer,
                hello.process.pid,
                f", offers {', '.join(hello.services)} on {hello.endpoint}" if hello.services else "",
            )

    def heard(self, sender: bytes, peer_id: str, stats: m.PeerStats) -> bool:
        """Note that the peer still is. Returns whether it is known, and by this connection."""
        peer = self._peers.get(peer_id)
        if peer is None or peer.sender != sender:
            return False
        peer.heard = time.monotonic()
        peer.stats = stats
        return True

    def leave(self, sender: bytes, peer_id: str) -> None:
        """Forget the peer, which leaves in good order; nothing is done where another connection says so."""
        peer = self._peers.get(peer_id)
        if peer is not None and peer.sender == sender:
            self._remove(peer_id, "left")

    def hold_until_hello(self, owner: str, process: m.ProcessId, hold: Hold) -> None:
        """Keep ``hold``, of an object made for ``owner``, until that says Hello, its ``process`` ends, or HANDOVER_SECONDS pass."""
        handover = self._handovers.get(owner)
        if handover is None:
            handover = self._handovers[owner] = _Handover([], time.monotonic(), Watch(process))
        handover.holds.append(hold)

    def look_after(self) -> None:
        """Remove who has died, end handovers that nobody took, and sweep when it is time. To be called at every turn of the broker's loop."""
        now = time.monotonic()
        for peer_id, peer in list(self._peers.items()):
            if not peer.watch.alive():
                self._remove(peer_id, "died")
            elif not peer.watch.tells and now - peer.heard > SILENT_SECONDS and not self._connected(peer.sender):
                self._remove(peer_id, "closed its connection and did not come back")
        for owner, handover in list(self._handovers.items()):
            if now - handover.since > HANDOVER_SECONDS or not handover.watch.alive():
                del self._handovers[owner]
                handover.end()
                if owner in self._peers:  # what was made anew, for one that is known
                    self._hold_for(self._peers[owner])
                self.reap("never taken over", owner)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self.reap("held by nobody")

    def reap(self, why: str, owner: str | None = None) -> None:
        """Unlink what nobody holds, of one owner or of all, and the sockets of workers that are no more. ``why``: for the log.

        With no file left to look with, nothing is reaped: the next sweep does it.
        """
        try:
            self._reap(why, owner)
        except OSError as error:
            if not is_exhaustion(error):
                raise
            log.warning("nothing is reaped now: %s", error)

    def _reap(self, why: str, owner: str | None) -> None:
        for reaped in reap(self._instance, owner):
            self.reaped_objects += 1
            self.reaped_bytes += reaped.nbytes
            log.info("reaped %s (%d bytes), %s", reaped.name.file, reaped.nbytes, why)
        # A living worker may have lost all its names, and not yet have said Hello to a broker that was started anew: its socket is asked too.
        alive = {*self._peers, *(name.owner for name in objects(self._instance))}
        for peer_id, path in endpoints.worker_sockets(self._sockets, self._instance):
            if peer_id not in alive and endpoints.is_left_behind(f"ipc://{path}"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Watch nobody any more, and reap what was never taken over. What the living hold stays, and what is held for them."""
        for peer in self._peers.values():
            peer.watch.close()
        for handover in self._handovers.values():
            handover.end()
        self.reap("never taken over")

    def _watch(self, hello: m.Hello) -> Watch:
        """By its pid, else by its hold on its doorbell (H5), else not at all."""
        watch = Watch(hello.process)
        if watch.tells:
            return watch
        try:
            return Watch(hello.process, HoldWatch(names.bell_path(names.bell_name(self._instance, hello.peer))).held)
        except OSError:
            return watch

    def _came_back(self, known: Peer, hello: m.Hello) -> bool:
        """Whether it is the same process on another connection, having lost the one before."""
        return known.hello.process == hello.process and not self._connected(known.sender)

    def _hold_for(self, peer: Peer) -> None:
        """Hold what the peer has and cannot hold itself, so that it is not reaped under it (H4)."""
        paths = [names.bell_path(names.bell_name(self._instance, peer.hello.peer))]
        if peer.hello.segment:
            paths.append(store().path(peer.hello.segment))
        for path in paths:
            if os.path.exists(path) and not is_surely_held(path):
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
        handover = self._handovers.pop(peer_id, None)  # of what was made anew
        if handover is not None:
            handover.end()
        log.info("%s %s (%s, pid %d) %s", peer.hello.role, peer.hello.name, peer_id, peer.hello.process.pid, why)
        self.reap(f"of {peer_id}, which {why}", peer_id)
        # It is told too: were it wrong, it would say Hello again at once.
        for other in (*self._peers.values(), peer):
            self._send(other.sender, m.PeerGone(peer_id))
