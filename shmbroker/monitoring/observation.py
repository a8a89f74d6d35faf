"""Looking at an instance: what the broker knows, and what the header of each client's segment tells."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shmbroker.control import messages as m
from shmbroker.errors import SegmentError
from shmbroker.monitoring.figures import SegmentFigures, read_figures


@dataclass(frozen=True, slots=True)
class ObservedClient:
    """A client; ``figures`` is None when its segment cannot be read, and ``why`` tells the reason."""

    peer: m.PeerStatus
    figures: SegmentFigures | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """An instance at a moment."""

    status: m.StatusReport
    seconds: float
    """When, by the monotonic clock."""
    clients: tuple[ObservedClient, ...]

    @property
    def workers(self) -> list[m.PeerStatus]:
        """Those that offer services."""
        return [peer for peer in self.status.peers if peer.role == "worker"]

    def name_of(self, peer_id: str) -> str:
        """The name of a peer, or its id when the broker does not know it (any more)."""
        return next((peer.name for peer in self.status.peers if peer.peer == peer_id), peer_id)


def observe(status: m.StatusReport, most_channels: int = 1024) -> Observation:
    """Read the header of every client's segment, and of each the first ``most_channels`` open channels."""
    clients = tuple(_observe(peer, most_channels) for peer in status.peers if peer.role == "client")
    return Observation(status, time.monotonic(), clients)


def _observe(peer: m.PeerStatus, most_channels: int) -> ObservedClient:
    try:
        return ObservedClient(peer, read_figures(peer.segment, most_channels))
    except SegmentError as error:
        return ObservedClient(peer, None, str(error))
