"""The shm lane: frames in queues of the client's segment. One class for each end."""

from __future__ import annotations

from shmbroker.lane.doorbell import PollingBell, SemaphoreBell
from shmbroker.lane.ends import CompletionReceiver, CompletionSender, SubmissionReceiver, SubmissionSender
from shmbroker.lane.python_ends import Receiver
from shmbroker.memory import layout
from shmbroker.memory.segment import Segment
from shmbroker.settings.kinds import Doorbell, Lane

Bell = SemaphoreBell | PollingBell

CLIENT_SLEEPING = layout.offset_of(layout.SegmentHeader, "client_sleeping")
"""Offset in the segment (bytes) of the word that the client sets while it is blocked."""


class _Offsets:
    """Where the parts of one channel area lie, as offsets in the segment (bytes)."""

    def __init__(self, segment: Segment, index: int) -> None:
        geometry = segment.geometry
        area = geometry.channel_offset(index)
        self.submissions = area + geometry.submissions_offset
        self.completions = area + geometry.completions_offset
        self.submissions_taken = area + layout.offset_of(layout.ChannelHeader, "submissions_taken")
        self.completions_taken = area + layout.offset_of(layout.ChannelHeader, "completions_taken")
        self.worker_sleeping = area + layout.offset_of(layout.ChannelHeader, "worker_sleeping")


def clear_channel(segment: Segment, index: int) -> None:
    """Make a channel area as new, before it is opened again: header words, sequence numbers and statistics are zero."""
    geometry = segment.geometry
    for start, nbytes in (
        (geometry.channel_offset(index), geometry.channel_bytes),
        (geometry.statistics_of(index), layout.STATISTICS_BYTES),
    ):
        segment.map[start : start + nbytes] = bytes(nbytes)


class ShmClientLane:
    """The client's end: ``submit`` frames, ``take`` completions. Callers serialise each of the two sides."""

    kind = Lane.SHM
    socket_bytes = 0

    def __init__(self, segment: Segment, index: int, worker_bell: Bell) -> None:
        offsets = _Offsets(segment, index)
        self.peer_bell = worker_bell
        self.depth = segment.geometry.depth
        self.doorbell: Doorbell = worker_bell.kind
        sender = SubmissionSender(segment, offsets.submissions, offsets.submissions_taken, offsets.worker_sleeping, worker_bell.ring)
        receiver = CompletionReceiver(segment, offsets.completions, offsets.completions_taken)
        self.ends = sender, receiver
        self.receivers: tuple[Receiver, ...] = (receiver,)
        self.submit = sender.submit
        self.nudge = sender.nudge
        self.take = receiver.take
        self.ready = receiver.ready

    def close(self) -> None:
        """Give the worker's bell up, and the segment."""
        self.peer_bell.close()
        if hasattr(self, "submit"):
            del self.ends, self.submit, self.nudge, self.receivers, self.take, self.ready


class ShmWorkerLane:
    """The worker's end: ``take`` submissions, ``complete`` them."""

    kind = Lane.SHM

    def __init__(self, segment: Segment, index: int, client_bell: Bell) -> None:
        offsets = _Offsets(segment, index)
        self.peer_bell = client_bell
        self.doorbell: Doorbell = client_bell.kind
        self.sleeping = (segment.words, offsets.worker_sleeping // 8)
        """The word to set while blocked, for the client to see."""
        sender = CompletionSender(segment, offsets.completions, offsets.completions_taken, CLIENT_SLEEPING, client_bell.ring)
        self.receiver = SubmissionReceiver(segment, offsets.submissions, offsets.submissions_taken)
        self.sender = sender
        self.complete = sender.complete
        """False when the client has left its queue full, against the rules."""
        self.take = self.receiver.take
        self.ready = self.receiver.ready
        self._words = segment.words
        self._taken_word = offsets.submissions_taken // 8
        self._first_sequence_word = offsets.submissions // 8
        self._depth = segment.geometry.depth

    def waiting(self) -> int:
        """How many frames are published and not taken; none once the lane is closed. From any thread, while the segment is mapped."""
        words: memoryview | None = getattr(self, "_words", None)
        depth = self._depth
        if words is None:
            return 0
        first = words[self._taken_word]
        for position in range(first, first + depth):
            if words[self._first_sequence_word + position % depth * (layout.SUBMISSION_SLOT_BYTES // 8)] != position + 1:
                return int(position - first)
        return depth

    def close(self) -> None:
        """Give the client's bell up, and the segment."""
        self.peer_bell.close()
        if hasattr(self, "complete"):
            del self.complete, self.sender, self.receiver, self.take, self.ready, self.sleeping, self._words
