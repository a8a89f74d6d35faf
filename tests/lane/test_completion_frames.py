"""Completions: what is written is read back, and what cannot be one is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.lane.completion_frames import Completion, pack_text, read_completion, read_plain_completion, write_completion
from shmbroker.lane.frame_layout import COMPLETION_HEADER, SEQUENCE_WORD
from shmbroker.lane.frames import Slot, private_slot
from shmbroker.memory import layout
from shmbroker.memory.layout import CompletionFrame
from tests.lane.submissions import UINT32_MAX, UINT64_MAX

uint64s = st.integers(0, UINT64_MAX)


@settings(deadline=None)
@given(uint64s, st.integers(0, UINT32_MAX), uint64s, uint64s, st.just(b"") | st.binary(max_size=layout.TEXT_BYTES))
def test_a_completion_is_read_back(call_id: int, status: int, queued_ns: int, compute_ns: int, text: bytes) -> None:
    completion = Completion(call_id, status, queued_ns, compute_ns, text)
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    slot.bytes[:] = b"\xff" * len(slot.bytes)
    nbytes = write_completion(slot, completion)
    assert nbytes == CompletionFrame.body.offset + len(text)
    assert slot.words[SEQUENCE_WORD] == UINT64_MAX, "L2: that is for the queue to write, last"
    assert read_completion(bytes(slot.bytes[:nbytes])) == completion
    assert read_completion(bytes(slot.bytes)) == completion
    assert read_plain_completion(slot) == (None if text else completion)
    frame = CompletionFrame.from_buffer_copy(slot.bytes)
    assert (frame.call_id, frame.status, frame.text_bytes, frame.reserved0, frame.reserved1) == (call_id, status, len(text), 0, 0)
    assert (frame.queued_ns, frame.compute_ns) == (queued_ns, compute_ns)
    assert bytes(frame.body)[: len(text)] == text


def test_a_completion_tells_call_status_times_and_text() -> None:
    assert Completion._fields == ("call_id", "status", "queued_ns", "compute_ns", "body")


def test_of_a_completion_without_a_text_only_the_head_is_copied() -> None:
    """F1: and it is copied before it is looked at."""

    class Watched:
        """Stands for the slot's head: changes right after the copy, as a peer may."""

        def __bytes__(self) -> bytes:
            copied = bytes(head)
            slot.bytes[:] = b"\xff" * len(slot.bytes)
            return copied

    completion = Completion(1, layout.Status.EXPIRED, 2, 3, b"")
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    write_completion(slot, completion)
    head = slot.head
    assert len(head) == CompletionFrame.body.offset
    slot.head = Watched()  # type: ignore[assignment]
    assert read_plain_completion(slot) == completion


@pytest.mark.parametrize("nbytes", [0, 1, 8, COMPLETION_HEADER.size - 1])
def test_a_completion_shorter_than_its_header_is_none(nbytes: int) -> None:
    assert read_completion(bytes(nbytes)) is None


@pytest.mark.parametrize("text_bytes", [layout.TEXT_BYTES + 1, 65535, 1 << 31, 0xFFFFFFFF])
def test_a_completion_with_a_text_beyond_its_room_is_none(text_bytes: int) -> None:
    frame = bytes(CompletionFrame(call_id=1, text_bytes=text_bytes))
    assert read_completion(frame) is None
    assert read_plain_completion(Slot(memoryview(bytearray(frame)))) is None


def test_what_is_reserved_in_a_completion_is_not_looked_at() -> None:
    frame = CompletionFrame(call_id=1, status=2, reserved0=UINT32_MAX, reserved1=UINT32_MAX, queued_ns=3, compute_ns=4)
    frame.reserved2[:] = b"\xff" * 16
    assert read_completion(bytes(frame)) == Completion(1, 2, 3, 4, b"")
    assert read_plain_completion(Slot(memoryview(bytearray(frame)))) == Completion(1, 2, 3, 4, b"")


def test_a_completion_that_ends_before_its_text_does_is_none() -> None:
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    for text in (b"t", b"text", b"x" * layout.TEXT_BYTES):
        nbytes = write_completion(slot, Completion(1, 1, 0, 0, text))
        for short in {nbytes - 1, nbytes - len(text)}:
            assert read_completion(bytes(slot.bytes[:short])) is None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=1100) | st.builds(lambda head, body: head + body, st.binary(min_size=64, max_size=64), st.just(bytes(960))))
def test_random_bytes_are_a_completion_within_their_bounds_or_none(frame: bytes) -> None:
    found = read_completion(frame)
    if found is not None:
        assert len(found.body) <= len(frame) - CompletionFrame.body.offset
        assert found.body == frame[CompletionFrame.body.offset :][: len(found.body)]


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=64, max_size=64), st.booleans())
def test_reading_the_head_alone_says_the_same_of_a_completion_without_a_text(head: bytes, without_text: bool) -> None:
    frame = CompletionFrame.from_buffer_copy(head + bytes(layout.TEXT_BYTES))
    if without_text:
        frame.text_bytes = 0
    plain = read_plain_completion(Slot(memoryview(bytearray(frame))))
    assert plain == (None if frame.text_bytes else read_completion(bytes(frame)))


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="aé€😀", min_size=150, max_size=1100))
def test_a_text_is_cut_at_a_character_so_that_it_just_fits(text: str) -> None:
    packed = pack_text(text)
    kept = packed.decode("utf-8")
    assert text.startswith(kept)
    assert len(packed) <= layout.TEXT_BYTES
    if kept != text:
        assert len(packed) + len(text[len(kept)].encode()) > layout.TEXT_BYTES


def test_a_text_that_utf8_has_no_bytes_for_is_packed_too() -> None:
    assert pack_text("before \udc80 after").decode() == "before ? after"


@pytest.mark.parametrize("characters", [479, 480, 481])
def test_a_text_around_the_limit_is_kept_or_cut_to_whole_characters(characters: int) -> None:
    assert pack_text("é" * characters) == ("é" * min(characters, 480)).encode()
    assert pack_text("x" + "é" * characters) == ("x" + "é" * min(characters, 479)).encode()
