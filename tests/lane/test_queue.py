"""Queues: order, room, what is seen when, and peers that write nonsense; then two real processes."""

from __future__ import annotations

import ctypes
import random
import struct
import time
import zlib
from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmbroker.lane.frame_layout import SEQUENCE_WORD
from shmbroker.lane.queue import QueueReader, QueueWriter
from shmbroker.lane.shm_lane import clear_channel
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.layout import ChannelHeader
from shmbroker.memory.segment import Segment
from tests.conftest import END_SECONDS, SegmentOf, StartChild

SLOT_BYTES = layout.SUBMISSION_SLOT_BYTES
UINT64_MAX = (1 << 64) - 1
FIRST_BYTE = 8
"""Of what a producer writes into a slot: the word before is the sequence number."""

TRANSFER_SECONDS = 300.0
"""In which all frames between two processes must have passed: many times what it takes."""


def _geometry(depth: int) -> Geometry:
    return Geometry(arena_bytes=layout.PAGE, channel_count=2, depth=depth)


def _places(segment: Segment) -> tuple[int, int, int, int]:
    """Of the submission queue of channel area 1: offset, depth, bytes of a slot, offset of the taken word."""
    geometry = segment.geometry
    area = geometry.channel_offset(1)
    return area + geometry.submissions_offset, geometry.depth, SLOT_BYTES, area + layout.offset_of(ChannelHeader, "submissions_taken")


def _ends(segment: Segment) -> tuple[QueueWriter, QueueReader]:
    return QueueWriter(segment, *_places(segment)), QueueReader(segment, *_places(segment))


def _taken_word(segment: Segment) -> int:
    return _places(segment)[3] // 8


def _sequence_word(segment: Segment, position: int) -> int:
    offset, depth, slot_bytes, _ = _places(segment)
    return (offset + position % depth * slot_bytes) // 8


def _send(writer: QueueWriter, number: int) -> bool:
    slot = writer.claim()
    if slot is None:
        return False
    slot.bytes[FIRST_BYTE : FIRST_BYTE + 8] = number.to_bytes(8, "little")
    writer.commit()
    return True


def _number(frame: bytes | None) -> int:
    assert frame is not None
    assert len(frame) == SLOT_BYTES
    return int.from_bytes(frame[FIRST_BYTE : FIRST_BYTE + 8], "little")


@pytest.fixture(params=[1, 2, 4, 64])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def segment(segment_of: SegmentOf, depth: int) -> Segment:
    return segment_of(_geometry(depth))


def test_a_fresh_queue_has_nothing_to_take(segment: Segment) -> None:
    _, reader = _ends(segment)
    assert not reader.ready()
    assert reader.take() is None


def test_frames_come_out_in_the_order_they_went_in_many_times_round(segment: Segment, depth: int) -> None:
    writer, reader = _ends(segment)
    sent = taken = 0
    for batch in [1, depth, depth // 2 + 1] * 40:
        for _ in range(batch):
            sent += _send(writer, sent)
        while (frame := reader.take()) is not None:
            assert _number(frame) == taken
            taken += 1
    assert sent == taken
    assert sent > 20 * depth


def test_a_full_queue_has_nothing_to_claim_until_a_frame_is_taken(segment: Segment, depth: int) -> None:
    """Q1."""
    writer, reader = _ends(segment)
    for number in range(depth):
        assert _send(writer, number)
    assert writer.claim() is None
    assert writer.claim() is None
    assert _number(reader.take()) == 0
    assert _send(writer, depth)
    assert writer.claim() is None
    assert [_number(reader.take()) for _ in range(depth)] == list(range(1, depth + 1))
    assert reader.take() is None


def test_the_word_taken_counts_the_frames_taken(segment: Segment, depth: int) -> None:
    """L3: it is written by the consumer alone."""
    writer, reader = _ends(segment)
    for number in range(3 * depth):
        assert segment.words[_taken_word(segment)] == number
        _send(writer, number)
        assert segment.words[_taken_word(segment)] == number, "the reader's word is not the writer's to write"
        reader.take()
    assert segment.words[_taken_word(segment)] == 3 * depth


def test_a_slot_is_published_by_its_position_plus_one(segment: Segment, depth: int) -> None:
    """L2."""
    writer, reader = _ends(segment)
    for position in range(3 * depth):
        _send(writer, position)
        assert segment.words[_sequence_word(segment, position)] == position + 1
        frame = reader.take()
        assert frame is not None
        assert struct.unpack_from("<Q", frame) == (position + 1,)


def test_a_slot_that_is_filled_but_not_committed_is_not_seen(segment: Segment, depth: int) -> None:
    """Q2, in the first round and when the slot holds an older frame."""
    writer, reader = _ends(segment)
    for number in range(2 * depth + 1):
        slot = writer.claim()
        assert slot is not None
        slot.bytes[FIRST_BYTE:] = bytes([number % 255 + 1]) * (SLOT_BYTES - FIRST_BYTE)
        assert not reader.ready()
        assert reader.take() is None
        writer.commit()
        assert reader.ready()
        frame = reader.take()
        assert frame is not None
        assert frame[FIRST_BYTE:] == bytes([number % 255 + 1]) * (SLOT_BYTES - FIRST_BYTE)


def test_claiming_again_before_committing_gives_the_same_slot(segment: Segment) -> None:
    writer, reader = _ends(segment)
    first, second = writer.claim(), writer.claim()
    assert first is not None
    assert second is not None
    first.words[5] = 42
    assert second.words[5] == 42
    writer.commit()
    assert reader.take() is not None
    assert reader.take() is None


def test_looking_takes_nothing(segment: Segment) -> None:
    writer, reader = _ends(segment)
    assert reader.peek() is None
    _send(writer, 7)
    for _ in range(2):
        assert reader.ready()
        slot = reader.peek()
        assert slot is not None
        assert _number(bytes(slot.bytes)) == 7
    assert segment.words[_taken_word(segment)] == 0
    assert _number(reader.take()) == 7
    assert not reader.ready()
    assert reader.peek() is None


def test_advancing_over_what_was_looked_at_is_taking_it(segment: Segment, depth: int) -> None:
    """Q3: the slot may be filled again from then on, and not before."""
    writer, reader = _ends(segment)
    for number in range(depth):
        _send(writer, number)
    for number in range(3 * depth):
        slot = reader.peek()
        assert slot is not None
        assert _number(bytes(slot.bytes)) == number
        assert writer.claim() is None
        reader.advance()
        assert segment.words[_taken_word(segment)] == number + 1
        assert _send(writer, number + depth)


def test_a_slot_is_the_same_memory_as_bytes_words_halves_and_head(segment: Segment, depth: int) -> None:
    writer, _ = _ends(segment)
    start = _places(segment)[0]
    for position in range(depth):
        slot = writer.claim()
        assert slot is not None
        slot.words[1] = 0x1122334455667788
        slot.halves[4] = 0xAABBCCDD
        at = start + position * SLOT_BYTES
        for memory in (segment.map[at : at + SLOT_BYTES], bytes(slot.bytes), bytes(slot.head)):
            assert memory[8:20] == bytes.fromhex("8877665544332211ddccbbaa")
        assert (len(slot.bytes), len(slot.words) * 8, len(slot.halves) * 4) == (SLOT_BYTES,) * 3
        writer.commit()


def test_each_slot_of_a_fresh_queue_remembers_no_template(segment: Segment, depth: int) -> None:
    """What lies in it may be of a channel that was open before."""
    writer, _ = _ends(segment)
    _send(writer, 1)
    writer, _ = _ends(segment)
    for _ in range(depth):
        slot = writer.claim()
        assert slot is not None
        assert slot.template is None
        writer.commit()


def test_a_taken_frame_is_a_copy_that_a_later_frame_in_its_slot_does_not_change(segment: Segment, depth: int) -> None:
    """Q3."""
    writer, reader = _ends(segment)
    _send(writer, 1111)
    first = reader.take()
    kept = bytes(first or b"")
    for number in range(2 * depth):
        _send(writer, number)
        reader.take()
    start = _places(segment)[0]
    segment.map[start : start + depth * SLOT_BYTES] = b"\xee" * (depth * SLOT_BYTES)
    assert first == kept
    assert _number(first) == 1111


def test_the_frame_is_copied_before_its_slot_is_given_back(segment: Segment) -> None:
    """Q3: in the bytes of the frame, the word is still the one from before."""
    writer, reader = _ends(segment)
    seen: list[int] = []
    taken = _taken_word(segment)

    class Watched:
        """Stands for the slot's memory: tells the word at the moment of copying."""

        def __bytes__(self) -> bytes:
            seen.append(segment.words[taken])
            return b"copied"

    _send(writer, 1)
    slot = reader.peek()
    assert slot is not None
    slot.bytes = Watched()  # type: ignore[assignment]
    assert reader.take() == b"copied"
    assert seen == [0]
    assert segment.words[taken] == 1


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(["send", "take"]), max_size=150))
def test_any_mixture_of_sending_and_taking_behaves_like_a_bounded_queue(segment: Segment, depth: int, actions: list[str]) -> None:
    clear_channel(segment, 1)
    writer, reader = _ends(segment)
    model: deque[int] = deque()
    for number, action in enumerate(actions):
        assert reader.ready() == bool(model)
        if action == "send":
            assert _send(writer, number) == (len(model) < depth)
            if len(model) < depth:
                model.append(number)
        elif model:
            assert _number(reader.take()) == model.popleft()
        else:
            assert reader.take() is None


# --- a peer that writes nonsense -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonsense", [1, 1 << 32, 1 << 63, UINT64_MAX])
def test_a_taken_word_ahead_of_the_writer_lets_it_overwrite_the_peers_own_frames_and_nothing_else(
    segment: Segment, depth: int, nonsense: int
) -> None:
    writer, reader = _ends(segment)
    before = bytes(segment.map)
    for number in range(3 * depth + 2):
        segment.words[_taken_word(segment)] = max(nonsense, number)
        assert _send(writer, number)
    start, _, _, taken = _places(segment)
    after = bytes(segment.map)
    assert after[:taken] == before[:taken]
    assert after[taken + 8 : start] == before[taken + 8 : start]
    assert after[start + depth * SLOT_BYTES :] == before[start + depth * SLOT_BYTES :]
    assert reader.take() is None, "its next frame is overwritten: lost, not mixed up"


def test_a_writer_that_was_lied_to_once_heeds_the_word_again_when_it_is_right(segment: Segment, depth: int) -> None:
    """Q1: a number of frames that were never sent is not believed."""
    writer, _ = _ends(segment)
    for number in range(depth):
        assert _send(writer, number)
    segment.words[_taken_word(segment)] = UINT64_MAX
    assert _send(writer, depth)
    segment.words[_taken_word(segment)] = 1
    for number in range(depth - 1):
        assert _send(writer, number)
    assert writer.claim() is None


def test_a_taken_word_that_goes_back_frees_no_slot_and_harms_none_once_it_is_right_again(segment: Segment, depth: int) -> None:
    """Q1."""
    writer, reader = _ends(segment)
    for number in range(5 * depth):
        _send(writer, number)
        reader.take()
    for number in range(depth):
        assert _send(writer, number)
    for lie in (0, 4 * depth):
        segment.words[_taken_word(segment)] = lie
        assert writer.claim() is None
    segment.words[_taken_word(segment)] = 5 * depth
    assert writer.claim() is None
    reader.take()
    assert _send(writer, depth)


def test_a_writer_counts_its_positions_privately(segment: Segment, depth: int) -> None:
    """Sequence numbers that the consumer overwrites in the producer's slots are not read back by the producer."""
    writer, reader = _ends(segment)
    for position in range(3 * depth):
        segment.words[_sequence_word(segment, position)] = UINT64_MAX
        assert _send(writer, position)
        assert segment.words[_sequence_word(segment, position)] == position + 1
        assert _number(reader.take()) == position


@pytest.mark.parametrize("lie", [0, 2, 1 << 32 | 1, 1 << 63, UINT64_MAX])
def test_any_sequence_but_the_next_is_not_a_frame(segment: Segment, depth: int, lie: int) -> None:
    _, reader = _ends(segment)
    segment.words[_sequence_word(segment, 0)] = lie
    assert not reader.ready()
    assert reader.take() is None
    assert segment.words[_taken_word(segment)] == 0


def test_a_frame_left_from_the_round_before_is_not_taken_twice(segment: Segment, depth: int) -> None:
    writer, reader = _ends(segment)
    for number in range(depth):
        _send(writer, number)
        reader.take()
    for position in range(depth):
        assert segment.words[_sequence_word(segment, position)] == position + 1
    assert reader.take() is None


# --- two processes ---------------------------------------------------------------------------------------------------------------------

FRAMES = 20_000
_CHECKED = struct.Struct("<QQI")  # sequence (the queue's), number, checksum of the rest
_REST_BYTES = SLOT_BYTES - _CHECKED.size


def _pattern(number: int) -> bytes:
    """What frame ``number`` is full of: another thing for every frame, so that a torn one shows."""
    return random.Random(number).randbytes(16) * (_REST_BYTES // 16 + 1)


def _write_all(name: str, count: int) -> None:
    segment = Segment.attach(name, hold=False)
    writer, _ = _ends(segment)
    until = time.monotonic() + TRANSFER_SECONDS
    for number in range(count):
        rest = _pattern(number)[:_REST_BYTES]
        while (slot := writer.claim()) is None:
            assert time.monotonic() < until, f"stuck before frame {number}"
            time.sleep(0)  # lets the reader run where there is one CPU
        slot.bytes[FIRST_BYTE:] = _CHECKED.pack(0, number, zlib.crc32(rest))[FIRST_BYTE:] + rest
        writer.commit()


def test_frames_between_two_processes_are_not_lost_nor_doubled_nor_torn(segment_of: SegmentOf, start_child: StartChild) -> None:
    """Q1, Q2, Q3, through a queue that is full or empty most of the time."""
    segment = segment_of(_geometry(4))
    _, reader = _ends(segment)
    child = start_child(_write_all, segment.name, FRAMES)
    until = time.monotonic() + TRANSFER_SECONDS
    for expected in range(FRAMES):
        while (frame := reader.take()) is None:
            assert time.monotonic() < until, f"stuck before frame {expected}"
            time.sleep(0)
        sequence, number, checksum = _CHECKED.unpack_from(frame)
        assert (sequence, number) == (expected + 1, expected)
        assert zlib.crc32(frame[_CHECKED.size :]) == checksum, f"frame {expected} is torn"
    assert reader.take() is None
    child.join(END_SECONDS)
    assert child.exitcode == 0


def test_a_slot_is_as_long_as_the_frame_that_goes_into_it() -> None:
    assert ctypes.sizeof(layout.SubmissionFrame) == SLOT_BYTES
    assert layout.offset_of(layout.SubmissionFrame, "sequence") == SEQUENCE_WORD * 8
