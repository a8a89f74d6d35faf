"""The published layout, kept true by literal tables: offsets, sizes, codes."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from shmbroker.arena.spec import CODE_OF, DTYPE_OF
from shmbroker.memory import layout
from shmbroker.memory.layout import (
    ChannelHeader,
    CompletionFrame,
    DTypeCode,
    SegmentHeader,
    Space,
    Status,
    SubmissionFrame,
)
from tests.memory.golden import (
    GOLDEN_CONSTANTS,
    GOLDEN_DTYPE_CODES,
    GOLDEN_FIELDS,
    GOLDEN_SIZES,
    GOLDEN_SPACES,
    GOLDEN_STATUSES,
    LINE_PAIR,
    Structure,
)


def _by_name(structure: Structure) -> str:
    return structure.__name__


def test_every_structure_has_a_golden_table() -> None:
    assert set(layout.STRUCTURES) == set(GOLDEN_SIZES) == set(GOLDEN_FIELDS)


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=_by_name)
def test_every_field_lies_where_the_published_layout_puts_it(structure: Structure) -> None:
    found = [(name, getattr(structure, name).offset, getattr(structure, name).size) for name, *_ in structure._fields_]
    assert found == GOLDEN_FIELDS[structure]
    assert [layout.offset_of(structure, name) for name, *_ in found] == [offset for _, offset, _ in GOLDEN_FIELDS[structure]]


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=_by_name)
def test_fields_cover_a_structure_without_gaps_or_overlap(structure: Structure) -> None:
    end = 0
    for name, offset, nbytes in GOLDEN_FIELDS[structure]:
        assert offset == end, f"hidden padding before {name}"
        end = offset + nbytes
    assert end == GOLDEN_SIZES[structure] == ctypes.sizeof(structure)


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=_by_name)
def test_ruler_in_the_docstring_tells_every_field_and_its_true_offset(structure: Structure) -> None:
    told = {name: int(offset) for offset, name in re.findall(r"\b(\d+)\s+([a-z]\w*)", structure.__doc__ or "")}
    for name, offset, _ in GOLDEN_FIELDS[structure]:
        if not name.startswith("reserved"):
            assert told.get(name) == offset


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=_by_name)
def test_ruler_in_the_docstring_tells_every_array_and_its_true_length(structure: Structure) -> None:
    arrays = {name: kind._length_ for name, kind, *_ in structure._fields_ if issubclass(kind, ctypes.Array)}
    told = {name: int(length) for name, length in re.findall(r"\b([a-z]\w*)\[(\d+)\]", structure.__doc__ or "")}
    assert told == {name: length for name, length in arrays.items() if not name.startswith("reserved")}


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=_by_name)
def test_every_scalar_lies_at_a_multiple_of_its_own_size(structure: Structure) -> None:
    """L4, also for the elements of arrays and the fields of descriptors within a frame."""

    def check(kind: Any, offset: int) -> None:
        if issubclass(kind, ctypes.Structure):
            for name, inner, *_ in kind._fields_:
                check(inner, offset + getattr(kind, name).offset)
        elif issubclass(kind, ctypes.Array):
            for index in range(kind._length_):
                check(kind._type_, offset + index * ctypes.sizeof(kind._type_))
        else:
            assert offset % ctypes.sizeof(kind) == 0

    check(structure, 0)


def test_slot_sizes_are_those_of_the_frames_and_whole_line_pairs() -> None:
    assert (layout.SUBMISSION_SLOT_BYTES, layout.COMPLETION_SLOT_BYTES) == (2048, 1024)
    assert layout.SUBMISSION_SLOT_BYTES % LINE_PAIR == layout.COMPLETION_SLOT_BYTES % LINE_PAIR == 0


def test_sequence_is_one_aligned_word_at_the_start_of_both_frames() -> None:
    """L2: it is published by one aligned 8-byte store."""
    for frame in (SubmissionFrame, CompletionFrame):
        assert (layout.offset_of(frame, "sequence"), frame.sequence.size) == (0, 8)


def test_what_changes_from_call_to_call_comes_before_what_is_the_same_for_an_op_on_the_same_blocks() -> None:
    """The worker recognises a call by the bytes from ``op_id`` to the last tensor, so these must lie together."""
    order = [name for name, *_ in SubmissionFrame._fields_]
    assert order[:5] == ["sequence", "call_id", "deadline_ns", "submitted_ns", "generations"]
    assert order[5:-1] == ["op_id", "input_count", "output_count", "flags", "metadata_bytes", "tensors"]
    assert order[-1] == "metadata"


def test_a_frame_has_a_generation_of_32_bits_for_each_of_its_tensors() -> None:
    generations = dict(SubmissionFrame._fields_)["generations"]
    assert (generations._length_, generations._type_) == (layout.MAX_TENSORS, ctypes.c_uint32)
    assert dict(SubmissionFrame._fields_)["tensors"]._length_ == layout.MAX_TENSORS


def test_no_two_words_that_change_share_a_line_pair() -> None:
    """L3: each has one writer, and no writer disturbs another's line."""
    words = [layout.offset_of(ChannelHeader, name) for name in ("completions_taken", "submissions_taken", "worker_sleeping")]
    assert len({offset // LINE_PAIR for offset in words}) == len(words)
    assert ctypes.sizeof(ChannelHeader) % LINE_PAIR == 0
    published_end = layout.offset_of(SegmentHeader, "made_at_ns") + 8
    assert layout.offset_of(SegmentHeader, "client_sleeping") // LINE_PAIR > published_end // LINE_PAIR


def test_constants_are_those_of_the_published_layout() -> None:
    assert {name: getattr(layout, name) for name in GOLDEN_CONSTANTS} == GOLDEN_CONSTANTS
    assert layout.MAGIC == b"SHMBROKR"
    assert layout.PAGE == 4096


def test_codes_are_never_reused() -> None:
    assert {code.name: code.value for code in DTypeCode} == GOLDEN_DTYPE_CODES
    assert {space.name: space.value for space in Space} == GOLDEN_SPACES
    assert {status.name: status.value for status in Status} == GOLDEN_STATUSES
    for enumeration in (DTypeCode, Space, Status):
        assert len(set(enumeration.__members__.values())) == len(enumeration.__members__), "an alias reuses a code"


def test_every_dtype_code_has_a_dtype_of_its_name() -> None:
    assert {str(dtype): code.name for dtype, code in CODE_OF.items()} == {f"torch.{name.lower()}": name for name in GOLDEN_DTYPE_CODES}
    assert {CODE_OF[dtype] for dtype in DTYPE_OF.values()} == set(DTypeCode)
