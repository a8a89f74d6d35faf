"""The shm lane: frames in queues of the client's segment. One class for each end."""

from __future__ import annotations

from shmbroker.lane.doorbell import PollingBell, SemaphoreBell, fence
from shmbroker.lane.frames import Completion, Slot, read_completion, read_plain_completion, write_completion
from shmbroker.lane.kinds import Doorbell, Lane
from shmbroker.lane.queue import QueueReader, QueueWriter
from shmbroker.memory import layout
from shmbroker.memory.segment import Segment

Bell = SemaphoreBell | PollingBell

_CLIENT_SLEEPING = layout.offset_of(layout.SegmentHeader, "client_sleeping") // 8


class _End:
    """What both ends share: the words of one channel area, and the peer's bell."""

    __slots__ = ("_area", "_peer_bell", "_peer_sleeping", "_segment", "depth", "doorbell", "sleeping")

    kind = Lane.SHM

    def __init__(self, segment: Segment, index: int, peer_bell: Bell, own_word: int, peer_word: int) -> None:
        self._segment = segment
        self._area = segment.geometry.channel_offset(index)
        self._peer_bell = peer_bell
        self._peer_sleeping = peer_word
        self.depth = segment.geometry.depth
        self.doorbell: Doorbell = peer_bell.kind
        self.sleeping = (segment.words, own_word)
        """The word to set while blocked, for the peer to see."""

    def _ring(self) -> None:
        fence()
        if self._segment.words[self._peer_sleeping]:
            self._peer_bell.ring()

    def _writer(self, offset: int, slot_bytes: int, taken: str) -> QueueWriter:
        word = self._area + layout.offset_of(layout.ChannelHeader, taken)
        return QueueWriter(self._segment, self._area + offset, self.depth, slot_bytes, word)

    def _reader(self, offset: int, slot_bytes: int, taken: str) -> QueueReader:
        word = self._area + layout.offset_of(layout.ChannelHeader, taken)
        return QueueReader(self._segment, self._area + offset, self.depth, slot_bytes, word)


def _worker_sleeping_word(segment: Segment, index: int) -> int:
    return (segment.geometry.channel_offset(index) + layout.offset_of(layout.ChannelHeader, "worker_sleeping")) // 8


def clear_channel(segment: Segment, index: int) -> None:
    """Make a channel area as new, before it is opened again: header words and sequence numbers are zero."""
    start = segment.geometry.channel_offset(index)
    segment.map[start : start + segment.geometry.channel_bytes] = bytes(segment.geometry.channel_bytes)


class ShmClientLane(_End):
    """The client's end: claims and commits submissions, takes completions. Callers serialise each of the two sides."""

    __slots__ = ("_completions", "_submissions", "claim", "ready", "socket_bytes")

    def __init__(self, segment: Segment, index: int, worker_bell: Bell) -> None:
        super().__init__(segment, index, worker_bell, _CLIENT_SLEEPING, _worker_sleeping_word(segment, index))
        geometry = segment.geometry
        self._submissions = self._writer(geometry.submissions_offset, layout.SUBMISSION_SLOT_BYTES, "submissions_taken")
        self._completions = self._reader(geometry.completions_offset, layout.COMPLETION_SLOT_BYTES, "completions_taken")
        self.claim = self._submissions.claim
        self.ready = self._completions.ready
        self.socket_bytes = 0

    def commit(self, nbytes: int) -> None:
        """Publish the claimed slot and wake the worker if it sleeps."""
        del nbytes  # the slot has its place, however much of it is used
        self._submissions.commit()
        self._ring()

    def take(self) -> Completion | None:
        """The next completion, or None. One that cannot be one is passed over."""
        queue = self._completions
        while (slot := queue.peek()) is not None:
            completion = read_plain_completion(slot)
            if completion is None:
                completion = read_completion(bytes(slot.bytes))
            queue.advance()
            if completion is not None:
                return completion
        return None

    def close(self) -> None:
        """Give the worker's bell up, and the segment."""
        self._peer_bell.close()
        if hasattr(self, "_segment"):
            del self._submissions, self._completions, self._segment, self.sleeping, self.claim, self.ready


class ShmWorkerLane(_End):
    """The worker's end: takes submissions, completes them."""

    __slots__ = ("_completions", "_submissions", "ready", "take")

    def __init__(self, segment: Segment, index: int, client_bell: Bell) -> None:
        super().__init__(segment, index, client_bell, _worker_sleeping_word(segment, index), _CLIENT_SLEEPING)
        geometry = segment.geometry
        self._submissions = self._reader(geometry.submissions_offset, layout.SUBMISSION_SLOT_BYTES, "submissions_taken")
        self._completions = self._writer(geometry.completions_offset, layout.COMPLETION_SLOT_BYTES, "completions_taken")
        self.ready = self._submissions.ready
        self.take = self._submissions.take

    def complete(self, completion: Completion) -> bool:
        """Write a completion and wake the client if it sleeps; False when the client has left its queue full, against the rules."""
        slot: Slot | None = self._completions.claim()
        if slot is None:
            return False
        write_completion(slot, completion)
        self._completions.commit()
        self._ring()
        return True

    def close(self) -> None:
        """Give the client's bell up, and the segment."""
        self._peer_bell.close()
        if hasattr(self, "_segment"):
            del self._submissions, self._completions, self._segment, self.sleeping, self.take, self.ready
