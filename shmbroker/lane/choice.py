"""Which lane and doorbell a channel uses: what its client asks for, and what its worker agrees to."""

from __future__ import annotations

from shmbroker.errors import BadInput, ChannelError
from shmbroker.lane.ends import shm_lane_needs
from shmbroker.settings.kinds import AUTO, DOORBELL_WORDS, LANE_WORDS, Doorbell, Lane


def asked(lane: str, doorbell: str) -> tuple[Lane, Doorbell]:
    """The client's side: what to ask for. ``auto`` is the fastest that this machine can do. Raises :class:`BadInput`."""
    if lane not in LANE_WORDS:
        raise BadInput(f"lane {lane!r} is not known; there are: {', '.join(LANE_WORDS)}")
    if doorbell not in DOORBELL_WORDS:
        raise BadInput(f"doorbell {doorbell!r} is not known; there are: {', '.join(DOORBELL_WORDS)}")
    needs = shm_lane_needs()
    if lane == Lane.ZMQ.value or (lane == AUTO and needs):
        if doorbell != AUTO:
            raise BadInput(f"doorbell {doorbell!r} belongs to lane shm; lane zmq has its socket")
        return Lane.ZMQ, Doorbell.SOCKET
    if needs:
        raise BadInput(f"lane shm needs {needs}; use lane zmq, or see what 'shmbroker doctor' says of the compiled parts")
    return Lane.SHM, Doorbell.SEM if doorbell == AUTO else Doorbell(doorbell)


def agreed(lane: str, doorbell: str) -> tuple[Lane, Doorbell]:
    """The worker's side: what the client asked for, where this side can do it too. Raises :class:`ChannelError`."""
    try:
        wanted = Lane(lane), Doorbell(doorbell)
    except ValueError as error:
        there = f"lanes: {', '.join(Lane)}; doorbells: {', '.join(word for word in DOORBELL_WORDS if word != AUTO)}"
        raise ChannelError(f"{error}; {there}") from None
    if wanted[0] is Lane.ZMQ:
        return Lane.ZMQ, Doorbell.SOCKET
    needs = shm_lane_needs()
    if needs:
        raise ChannelError(f"this worker has not what lane shm needs: {needs}; use lane zmq, or build the worker's compiled parts")
    if wanted[1] is Doorbell.SOCKET:
        raise ChannelError("doorbell socket belongs to lane zmq; lane shm takes sem or poll")
    return wanted
