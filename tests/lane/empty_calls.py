"""Calls without tensors over a lane of shared memory: a small segment for them, how one is submitted, answered and recognised."""

from __future__ import annotations

from shmbroker.lane.completion_frames import Completion
from shmbroker.lane.frames import FrameTemplate, Taken
from shmbroker.lane.shm_lane import CLIENT_SLEEPING, ShmClientLane
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment

GEOMETRY = Geometry(arena_bytes=layout.PAGE, channel_count=2, depth=2)

_NOTHING = FrameTemplate(1, [], [])


def submit(lane: ShmClientLane, call_id: int) -> bool:
    """Whether there was room for the call."""
    return lane.submit(_NOTHING, call_id, 0, 0, [], [])


def completion(call_id: int, text: bytes = b"") -> Completion:
    """Of the call ``call_id``, unlike that of any other."""
    return Completion(call_id, layout.Status.OP_ERROR if text else layout.Status.OK, call_id + 1, call_id + 2, text)


def id_of(taken: Taken | None) -> int:
    """Of a call that a worker has taken."""
    assert taken is not None
    call_id = layout.SubmissionFrame.from_buffer_copy(taken[-1]).call_id
    assert taken[0] == call_id
    return int(call_id)


def client_sleeping(segment: Segment) -> tuple[memoryview, int]:
    """The word that a client sleeps under, as a waiter takes it."""
    return segment.words, CLIENT_SLEEPING // 8
