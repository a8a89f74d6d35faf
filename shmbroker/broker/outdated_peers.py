"""The processes that speak another version of the control protocol, most often those that were started before the broker was upgraded.

They cannot join. Each is told of once in the log, and by ``status`` and ``doctor`` while it lives, so that somebody restarts it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shmbroker.control import endpoint as endpoints
from shmbroker.control.liveness import process_of
from shmbroker.control.messages import OutdatedPeer, ProcessId
from shmbroker.control.outdated import in_words
from shmbroker.memory import names
from shmbroker.memory.reaper import objects

log = logging.getLogger(__name__)

MOST_KEPT = 256
"""Told of at a time: whoever makes up ever new ones fills no memory."""

LOOK_SECONDS = 1.0
"""How often it is looked whether they live."""

SILENT_SECONDS = 120.0
"""After which one whose pid nothing tells is told of no more: many times what such a peer lets pass between two heartbeats."""


@dataclass(slots=True)
class _Met:
    peer: OutdatedPeer
    process: ProcessId | None
    """None where its pid is not known here."""
    heard: float


class OutdatedPeers:
    """Those that were met and still live. Used by one thread, but for :meth:`known`."""

    def __init__(self, instance: str, sockets: Path) -> None:
        """``sockets``: the folder of the workers' sockets."""
        self._instance = instance
        self._sockets = sockets
        self._met: dict[int | str, _Met] = {}
        """By pid, where it is known, else by id."""
        self._next_look = 0.0

    def known(self) -> tuple[OutdatedPeer, ...]:
        """All that live, the first met first. Callable from any thread."""
        return tuple([one.peer for one in list(self._met.values())])

    def meet(self, peer: OutdatedPeer) -> bool:
        """Note a message of ``peer``; returns whether it is the first. What gives no id is no peer (a command that asks), and the first each time."""
        if not peer.peer:
            return True
        now = time.monotonic()
        key = peer.pid or peer.peer
        met = self._met.get(key)
        if met is not None:
            met.heard = now
            return False
        if len(self._met) < MOST_KEPT:
            peer = peer if peer.role else msgspec.structs.replace(peer, role=self._role_of(peer.peer))
            self._met[key] = _Met(peer, process_of(peer.pid) if peer.pid else None, now)
            log.warning("%s", in_words(peer))
        return True

    def look_after(self) -> None:
        """Forget those that have ended. To be called at every turn of the broker's loop."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        for key, met in list(self._met.items()):
            if met.process is None:
                ended = now - met.heard > SILENT_SECONDS
            else:
                ended = not met.process.start_time or process_of(met.process.pid) != met.process
            if ended:
                del self._met[key]

    def _role_of(self, peer_id: str) -> str:
        """A heartbeat does not say it; what the process has made does."""
        if any(owner == peer_id for owner, _ in endpoints.worker_sockets(self._sockets, self._instance)):
            return "worker"
        if any(name.owner == peer_id and name.kind == names.SEGMENT for name in objects(self._instance)):
            return "client"
        return ""
