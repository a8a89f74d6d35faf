"""The published layout, kept true by literal tables: offsets, sizes, codes, the C header, and a geometry's arithmetic."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.arena.spec import CODE_OF, DTYPE_OF
from shmbroker.memory import layout
from shmbroker.memory.cheader import render, struct_name
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.layout import (
    ArenaStatistics,
    ChannelHeader,
    ChannelStatistics,
    CompletionFrame,
    DTypeCode,
    PicturedBlock,
    SegmentHeader,
    Space,
    Status,
    SubmissionFrame,
    TensorDescriptor,
)

Structure = type[ctypes.LittleEndianStructure]

LINE_PAIR = 128
"""Bytes that x86-64 fetches together: two cache lines."""

GOLDEN_SIZES: dict[Structure, int] = {
    SegmentHeader: 4096,
    PicturedBlock: 24,
    ArenaStatistics: 1632,
    ChannelStatistics: 1024,
    ChannelHeader: 512,
    TensorDescriptor: 152,
    SubmissionFrame: 2048,
    CompletionFrame: 1024,
}

# structure: field, offset, bytes. Other programs and other releases read these places: a change here is a new layout version.
GOLDEN_FIELDS: dict[Structure, list[tuple[str, int, int]]] = {
    SegmentHeader: [
        ("magic", 0, 8),
        ("version", 8, 4),
        ("byte_order", 12, 4),
        ("total_bytes", 16, 8),
        ("arena_offset", 24, 8),
        ("arena_bytes", 32, 8),
        ("channels_offset", 40, 8),
        ("channel_bytes", 48, 8),
        ("channel_count", 56, 4),
        ("alignment", 60, 4),
        ("submission_depth", 64, 4),
        ("submission_slot_bytes", 68, 4),
        ("completion_depth", 72, 4),
        ("completion_slot_bytes", 76, 4),
        ("instance", 80, 32),
        ("owner", 112, 32),
        ("maker_pid", 144, 4),
        ("owner_pid", 148, 4),
        ("made_at_ns", 152, 8),
        ("statistics_offset", 160, 8),
        ("statistics_bytes", 168, 8),
        ("reserved0", 176, 80),
        ("client_sleeping", 256, 8),
        ("reserved1", 264, 248),
        ("arena", 512, 1632),
        ("reserved2", 2144, 1952),
    ],
    PicturedBlock: [
        ("offset", 0, 8),
        ("nbytes", 8, 8),
        ("placed_ns", 16, 8),
    ],
    ArenaStatistics: [
        ("revision", 0, 8),
        ("published_ns", 8, 8),
        ("held_bytes", 16, 8),
        ("held_blocks", 24, 8),
        ("high_water_bytes", 32, 8),
        ("largest_free_bytes", 40, 8),
        ("placed_blocks", 48, 8),
        ("waits", 56, 8),
        ("full", 64, 8),
        ("copied_bytes", 72, 8),
        ("cursor", 80, 8),
        ("block_count", 88, 8),
        ("blocks", 96, 1536),
    ],
    ChannelStatistics: [
        ("revision", 0, 8),
        ("published_ns", 8, 8),
        ("opened_ns", 16, 8),
        ("calls", 24, 8),
        ("errors", 32, 8),
        ("sent_bytes", 40, 8),
        ("received_bytes", 48, 8),
        ("call_ns", 56, 8),
        ("copied_bytes", 64, 8),
        ("outstanding", 72, 8),
        ("lane", 80, 8),
        ("doorbell", 88, 8),
        ("worker", 96, 32),
        ("service", 128, 64),
        ("buckets", 192, 512),
        ("reserved0", 704, 64),
        ("worker_revision", 768, 8),
        ("worker_published_ns", 776, 8),
        ("run_calls", 784, 8),
        ("failed_calls", 792, 8),
        ("compute_ns", 800, 8),
        ("queued_ns", 808, 8),
        ("reserved1", 816, 208),
    ],
    ChannelHeader: [
        ("reserved0", 0, 128),
        ("completions_taken", 128, 8),
        ("reserved1", 136, 120),
        ("submissions_taken", 256, 8),
        ("reserved2", 264, 120),
        ("worker_sleeping", 384, 8),
        ("reserved3", 392, 120),
    ],
    TensorDescriptor: [
        ("offset", 0, 8),
        ("nbytes", 8, 8),
        ("dtype", 16, 1),
        ("ndim", 17, 1),
        ("space", 18, 1),
        ("flags", 19, 1),
        ("reserved", 20, 4),
        ("shape", 24, 64),
        ("strides", 88, 64),
    ],
    SubmissionFrame: [
        ("sequence", 0, 8),
        ("call_id", 8, 8),
        ("deadline_ns", 16, 8),
        ("submitted_ns", 24, 8),
        ("generations", 32, 48),
        ("op_id", 80, 4),
        ("input_count", 84, 2),
        ("output_count", 86, 2),
        ("flags", 88, 4),
        ("metadata_bytes", 92, 4),
        ("tensors", 96, 1824),
        ("metadata", 1920, 128),
    ],
    CompletionFrame: [
        ("sequence", 0, 8),
        ("call_id", 8, 8),
        ("status", 16, 4),
        ("reserved0", 20, 4),
        ("text_bytes", 24, 4),
        ("reserved1", 28, 4),
        ("queued_ns", 32, 8),
        ("compute_ns", 40, 8),
        ("reserved2", 48, 16),
        ("body", 64, 960),
    ],
}

GOLDEN_CONSTANTS = {
    "LAYOUT_VERSION": 3,
    "BYTE_ORDER_MARK": 0x01020304,
    "ALIGNMENT": 256,
    "MAX_DIMS": 8,
    "MAX_TENSORS": 12,
    "METADATA_BYTES": 128,
    "TEXT_BYTES": 960,
    "BUCKETS": 64,
    "FIRST_BUCKET": 19,
    "PICTURED_BLOCKS": 64,
}

# Codes are never reused: lines may be added here, none may change or go.
GOLDEN_DTYPE_CODES = {
    "FLOAT32": 1,
    "FLOAT64": 2,
    "FLOAT16": 3,
    "BFLOAT16": 4,
    "INT8": 5,
    "INT16": 6,
    "INT32": 7,
    "INT64": 8,
    "UINT8": 9,
    "BOOL": 10,
    "FLOAT8_E4M3FN": 11,
    "FLOAT8_E5M2": 12,
    "UINT16": 13,
    "UINT32": 14,
    "UINT64": 15,
    "COMPLEX64": 16,
    "COMPLEX128": 17,
}
GOLDEN_SPACES = {"SEGMENT": 0, "DEVICE": 1, "KEPT": 2}
GOLDEN_STATUSES = {"OK": 0, "OP_ERROR": 1, "BAD_FRAME": 2, "EXPIRED": 3, "DRAINING": 4}

geometries = st.builds(
    Geometry,
    arena_bytes=st.integers(1, 1 << 20).map(lambda pages: pages * layout.PAGE),
    channel_count=st.integers(1, 1024),
    depth=st.integers(0, 16).map(lambda power: 1 << power),
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


# --- geometry --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arena_bytes", [0, 1, -layout.PAGE, layout.PAGE - 1, layout.PAGE + 1, layout.PAGE + layout.ALIGNMENT])
def test_arena_must_measure_whole_pages(arena_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"arena_bytes .* not {arena_bytes}$"):
        Geometry(arena_bytes=arena_bytes)


@pytest.mark.parametrize("channel_count", [-1, 0, 1025])
def test_channel_count_must_be_1_to_1024(channel_count: int) -> None:
    with pytest.raises(ValueError, match=f"channel_count .* not {channel_count}$"):
        Geometry(channel_count=channel_count)


@pytest.mark.parametrize("depth", [-2, -1, 0, 3, 6, 65535, 131072])
def test_depth_must_be_a_power_of_two_up_to_65536(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth .* not {depth}$"):
        Geometry(depth=depth)


@pytest.mark.parametrize("geometry", [Geometry(layout.PAGE, 1, 1), Geometry(1 << 40, 1024, 65536), Geometry()], ids=str)
def test_extremes_and_defaults_are_allowed(geometry: Geometry) -> None:
    assert geometry.total_bytes > geometry.arena_bytes


def test_places_of_one_geometry_are_as_published() -> None:
    geometry = Geometry(arena_bytes=1 << 20, channel_count=3, depth=4)
    assert (geometry.submissions_offset, geometry.completions_offset, geometry.channel_bytes) == (512, 8704, 12800)
    assert (geometry.statistics_offset, geometry.statistics_of(2), geometry.channels_offset) == (4096, 6144, 8192)
    assert [geometry.channel_offset(index) for index in range(3)] == [8192, 20992, 33792]
    assert geometry.arena_offset == 49152
    assert geometry.total_bytes == 49152 + (1 << 20)


@settings(deadline=None, max_examples=200)
@given(geometries)
def test_areas_of_any_geometry_are_aligned_and_follow_each_other_without_overlap(geometry: Geometry) -> None:
    last = geometry.channel_count - 1
    assert geometry.statistics_offset == ctypes.sizeof(SegmentHeader)
    assert geometry.channel_offset(0) == geometry.channels_offset >= geometry.statistics_of(last) + ctypes.sizeof(ChannelStatistics)
    assert geometry.channel_offset(1) - geometry.channel_offset(0) == geometry.channel_bytes
    assert geometry.submissions_offset >= ctypes.sizeof(ChannelHeader)
    assert geometry.completions_offset >= geometry.submissions_offset + geometry.depth * layout.SUBMISSION_SLOT_BYTES
    assert geometry.channel_bytes >= geometry.completions_offset + geometry.depth * layout.COMPLETION_SLOT_BYTES
    assert geometry.channel_offset(last) % LINE_PAIR == 0
    assert 0 <= geometry.arena_offset - (geometry.channel_offset(last) + geometry.channel_bytes) < layout.PAGE
    assert geometry.arena_offset % layout.PAGE == geometry.arena_offset % layout.ALIGNMENT == 0
    assert geometry.total_bytes == geometry.arena_offset + geometry.arena_bytes
    assert geometry.total_bytes % layout.PAGE == 0


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 20))
def test_rounding_up_gives_the_least_multiple_that_is_not_below(value: int, multiple: int) -> None:
    rounded = layout.round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple


# --- the C header ----------------------------------------------------------------------------------------------------------------------


def _c_program() -> str:
    """A program that prints every field, size, constant and code as the C compiler sees it."""
    lines = ['#include "shmbroker.h"', "#include <stdio.h>", "int main(void) {"]

    def show(label: str, *values: str) -> None:
        lines.append(f'    printf("{label}{" %zu" * len(values)}\\n", {", ".join(f"(size_t)({value})" for value in values)});')

    for structure in layout.STRUCTURES:
        kind = f"struct {struct_name(structure)}"
        show(f"size {structure.__name__}", f"sizeof({kind})")
        for name, *_ in structure._fields_:
            show(f"field {structure.__name__}.{name}", f"offsetof({kind}, {name})", f"sizeof((({kind} *)0)->{name})")
    for name in GOLDEN_CONSTANTS:
        show(f"constant {name}", f"SHMBROKER_{name}")
    for prefix, codes in (("DTYPE", GOLDEN_DTYPE_CODES), ("SPACE", GOLDEN_SPACES), ("STATUS", GOLDEN_STATUSES)):
        for name in codes:
            show(f"code {prefix}_{name}", f"SHMBROKER_{prefix}_{name}")
    lines += ['    printf("magic %s\\n", SHMBROKER_MAGIC);', "    return 0;", "}"]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def seen_by_c(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) on this machine: the C header can only be compiled where there is one")
    folder: Path = tmp_path_factory.mktemp("cheader")
    (folder / "shmbroker.h").write_text(render())
    (folder / "show.c").write_text(_c_program())
    program = folder / "show"
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", str(folder / "show.c"), "-o", str(program)], check=True
    )
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_header_in_the_package_is_the_generated_one() -> None:
    """The compiled parts include it; ``python -m shmbroker.memory.cheader > shmbroker/memory/shmbroker.h`` makes it anew."""
    assert (Path(layout.__file__).parent / "shmbroker.h").read_text() == render()


def test_c_header_puts_every_field_where_ctypes_puts_it(seen_by_c: list[str]) -> None:
    expected = []
    for structure in layout.STRUCTURES:
        expected.append(f"size {structure.__name__} {ctypes.sizeof(structure)}")
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            expected.append(f"field {structure.__name__}.{name} {field.offset} {field.size}")
    assert [line for line in seen_by_c if line.startswith(("size ", "field "))] == expected


def test_c_header_has_the_constants_and_codes(seen_by_c: list[str]) -> None:
    expected = [f"constant {name} {value}" for name, value in GOLDEN_CONSTANTS.items()]
    for prefix, codes in (("DTYPE", GOLDEN_DTYPE_CODES), ("SPACE", GOLDEN_SPACES), ("STATUS", GOLDEN_STATUSES)):
        expected += [f"code {prefix}_{name} {value}" for name, value in codes.items()]
    assert [line for line in seen_by_c if line.startswith(("constant ", "code "))] == expected
    assert "magic SHMBROKR" in seen_by_c
