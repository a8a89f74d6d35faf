"""A client's own segment: made by the broker, held here for life, and unlinked at the end."""

from __future__ import annotations

from shmbroker.client.closing import Closing
from shmbroker.control import messages as m
from shmbroker.control.joining import ask_broker
from shmbroker.control.liveness import this_process
from shmbroker.control.sockets import Requester
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment
from shmbroker.memory.stores import store


def own_segment(broker: Requester, instance: str, client: str, geometry: Geometry, undo: Closing) -> Segment:
    """The segment of ``client``, mapped and held; ``undo`` gives it up. Raises what the broker refuses it with, and :class:`SegmentError`."""
    request = m.MakeSegment(client, this_process(), geometry.arena_bytes, geometry.channel_count, geometry.depth)
    made = ask_broker(broker, request, m.Made, instance, timeout=_reserving_seconds(geometry))
    # fault: before segment held
    segment = Segment.attach(made.name, hold=True)
    # fault: after segment held
    undo.add(store().unlink_own, made.name)
    undo.add(segment.close)
    return segment


def without_a_name(segment: Segment) -> str:
    """What is told where the name of ``segment`` was taken away."""
    return (
        f"the name of segment {segment.name} was taken away, as systemd-logind does at logout (RemoveIPC=yes): joining anew, with another arena of "
        f"{segment.geometry.arena_bytes} bytes, for tensors and channels from now on; the first one stays until the client is closed"
    )


def _reserving_seconds(geometry: Geometry) -> float:
    """How long making a segment may take: every page is zeroed, at 1 GiB/s or better, on top of the usual patience."""
    return 5.0 + geometry.total_bytes / 2**30
