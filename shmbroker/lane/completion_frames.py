"""How a call's outcome is written, and read by who cannot trust it."""

from __future__ import annotations

from typing import NamedTuple

from shmbroker.lane.frame_layout import (
    BODY_OFFSET,
    CALL_ID_WORD,
    COMPLETION_HEADER,
    COMPUTE_WORD,
    QUEUED_WORD,
    STATUS_HALF,
    STATUS_WORD,
    TEXT_WORD,
)
from shmbroker.lane.frames import Slot
from shmbroker.memory import layout

_NO_TEXT = b""

CompletionFields = tuple[int, int, int, int, bytes]
"""A :class:`Completion` as it travels: a plain tuple costs a fifth of a named one."""


class Completion(NamedTuple):
    """How a call ended. ``body`` is an error's text."""

    call_id: int
    status: int
    queued_ns: int
    compute_ns: int
    body: bytes


def write_completion(slot: Slot, completion: CompletionFields) -> int:
    """Fill ``slot`` with everything but the sequence number; returns the bytes used.

    Raises ValueError for a number that does not fit its field, for a body that is too long, and for a tuple of another length; TypeError for what is
    no integer, and a body that is no bytes.
    """
    call_id, status, queued_ns, compute_ns, body = completion
    words = slot.words
    words[CALL_ID_WORD] = call_id
    words[STATUS_WORD] = 0  # with what is reserved behind the status
    slot.halves[STATUS_HALF] = status
    words[QUEUED_WORD] = queued_ns
    words[COMPUTE_WORD] = compute_ns
    words[TEXT_WORD] = len(body)
    if body is not _NO_TEXT:  # as most are, and so the very object
        slot.bytes[BODY_OFFSET : BODY_OFFSET + len(body)] = body
    return BODY_OFFSET + len(body)


def read_completion(frame: bytes) -> Completion | None:
    """The completion in ``frame``, a private copy (F1); None for one that cannot be one (too short, a text beyond the room)."""
    if len(frame) < BODY_OFFSET:
        return None
    _, call_id, status, text_bytes, queued_ns, compute_ns = COMPLETION_HEADER.unpack_from(frame)
    if text_bytes > len(frame) - BODY_OFFSET:
        return None
    return Completion(call_id, status, queued_ns, compute_ns, frame[BODY_OFFSET : BODY_OFFSET + text_bytes])


def read_plain_completion(slot: Slot) -> Completion | None:
    """The completion in ``slot`` if it has no text, as most have: only its head is copied. None for any other."""
    _, call_id, status, text_bytes, queued_ns, compute_ns = COMPLETION_HEADER.unpack(bytes(slot.head))
    return None if text_bytes else Completion(call_id, status, queued_ns, compute_ns, b"")


def pack_text(text: str) -> bytes:
    """UTF-8, cut at a character so that it fits a completion."""
    return text.encode("utf-8", "replace")[: layout.TEXT_BYTES].decode("utf-8", "ignore").encode()
