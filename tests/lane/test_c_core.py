"""The core in C: its headers compile alone, put everything where Python puts it, and lose nothing between threads and processes that sleep and ring."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import shmbroker
from shmbroker.lane.shm_lane import CLIENT_SLEEPING
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment
from shmbroker.memory.stores import store
from tests.c_programs import STRICT, compiled, compiler, ran, sanitizing
from tests.conftest import SegmentOf

HERE = Path(__file__).parent
INCLUDE = Path(shmbroker.get_include())
HEADERS = sorted(str(path.relative_to(INCLUDE)) for path in INCLUDE.rglob("*.h"))
LANE = Path(shmbroker.__file__).parent / "lane"

FRAMES = "20000"
"""Through each queue: a second or two where every one of them is slept for."""

EMULATED_FRAMES = "5000"
RACING_FRAMES = "2000"

WAYS = [(who, what, depth) for who in ("threads", "processes") for what in ("calls", "stream") for depth in ("1", "4")]


def test_the_package_tells_where_its_headers_are() -> None:
    assert [
        "shmbroker.h",
        *(f"shmbroker/{name}.h" for name in ("bell", "doorbell", "frames", "layout", "queue", "segment", "word")),
    ] == HEADERS


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("language", [("cc", "c", "-std=c11"), ("c++", "c++", "-std=c++23")], ids=["C11", "C++23"])
def test_a_header_compiles_alone(header: str, language: tuple[str, str, str], tmp_path: Path) -> None:
    name, kind, standard = language
    by = compiler(name, "gcc" if kind == "c" else "g++")
    nothing = tmp_path / "nothing"
    nothing.write_text("")
    if subprocess.run([by, standard, "-x", kind, "-fsyntax-only", str(nothing)], capture_output=True, check=False).returncode:
        pytest.skip(f"{name} of this machine does not know {standard}, which the headers need")
    source = tmp_path / "alone"
    source.write_text(f"#include <{header}>\n#include <{header}>\nint main(void) {{ return 0; }}\n")
    done = subprocess.run(
        [by, standard, *STRICT[1:], "-O2", "-I", str(INCLUDE), "-x", kind, "-c", str(source), "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_header_needs_python() -> None:
    assert not [header for header in HEADERS if "Python.h" in (INCLUDE / header).read_text() or "Py_" in (INCLUDE / header).read_text()]


def test_shared_words_are_touched_by_the_steps_of_word_h_alone() -> None:
    """Also by the compiled ends: there is one copy of each order."""
    word = re.compile(r"atomic_(?!signal)\w+\(|memory_order_|__atomic_|__sync_")
    sources = [*(INCLUDE / header for header in HEADERS if header != "shmbroker/word.h"), *LANE.glob("*.c"), *LANE.glob("*.h")]
    assert len(sources) > 10
    assert not [str(path) for path in sources if word.search(path.read_text())]


@pytest.mark.parametrize("sanitizer", ["", "address,undefined"])
def test_what_an_end_does_holds_in_private_memory(sanitizer: str, tmp_path: Path) -> None:
    by, *flags = sanitizing(tmp_path, sanitizer) if sanitizer else (compiler(),)
    done = ran(compiled(HERE / "core_queue.c", tmp_path / "queue", "-O2", *flags, by=by))
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


# --- segments -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def look_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Segment, int], subprocess.CompletedProcess[str]]:
    program = compiled(HERE / "core_segment.c", tmp_path_factory.mktemp("core") / "segment", "-O2")
    return lambda segment, index: ran(program, store().path(segment.name), str(index))


LookAt = Callable[[Segment, int], subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("geometry", [Geometry(layout.PAGE, 1, 1), Geometry(3 * layout.PAGE, 5, 8), Geometry(1 << 20, 16, 64)], ids=str)
def test_the_parts_of_a_segment_lie_where_python_puts_them(geometry: Geometry, segment_of: SegmentOf, look_at: LookAt) -> None:
    segment = segment_of(geometry)
    for index in {0, geometry.channel_count - 1}:
        area = geometry.channel_offset(index)
        words = [
            area + layout.offset_of(layout.ChannelHeader, f"{name}")
            for name in ("submissions_taken", "completions_taken", "worker_sleeping")
        ]
        expected = [area + geometry.submissions_offset, area + geometry.completions_offset, *words, CLIENT_SLEEPING]
        done = look_at(segment, index)
        *places, left = map(int, done.stdout.split())
        assert places == [*expected, geometry.arena_offset, geometry.total_bytes]
        assert left == 0, "a channel area that was cleared is all zero"
    assert look_at(segment, geometry.channel_count).stdout == "no such channel area\n"


NUMBERS = [
    name for name, kind, *_ in layout.SegmentHeader._fields_
    if kind in (ctypes.c_uint32, ctypes.c_uint64) and name not in ("maker_pid", "owner_pid", "made_at_ns", "client_sleeping")
]  # fmt: skip


@pytest.mark.parametrize("field", [*NUMBERS, "magic"])
@pytest.mark.parametrize("value", [0, 1, 3, 1 << 31, (1 << 32) - 1])
def test_a_header_with_a_number_of_another_size_is_refused(field: str, value: int, segment_of: SegmentOf, look_at: LookAt) -> None:
    segment = segment_of(Geometry(layout.PAGE, 2, 4))
    header = layout.SegmentHeader.from_buffer(segment.map)
    setattr(header, field, str(value).encode()[:8] if field == "magic" else value)
    done = look_at(segment, 0)
    del header
    assert done.returncode == 1, done.stdout
    assert re.match("the (segment|file) ", done.stdout)


def test_a_segment_that_is_being_made_is_said_to_be(tmp_path: Path, segment_of: SegmentOf, look_at: LookAt) -> None:
    segment = segment_of(Geometry(layout.PAGE, 2, 4))
    os.truncate(store().path(segment.name), 100)
    assert look_at(segment, 0).stdout == "the segment is still being made: try again\n"


def test_a_segment_that_its_file_has_no_room_for_is_refused(segment_of: SegmentOf, look_at: LookAt) -> None:
    segment = segment_of(Geometry(layout.PAGE, 2, 4))
    os.truncate(store().path(segment.name), segment.geometry.total_bytes - layout.PAGE)
    assert "spoilt header" in look_at(segment, 0).stdout


# --- stress ---------------------------------------------------------------------------------------------------------------------------------


def stressed(program: Path, way: tuple[str, str, str], frames: str, under: tuple[str, ...] = ()) -> None:
    done = ran(program, *way, frames, under=under)
    assert (done.returncode, done.stdout) == (0, f"{frames} frames\n"), done.stderr


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(HERE / "core_stress.c", tmp_path_factory.mktemp("core") / "stress", "-O2")


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_every_frame_comes_whole_and_in_order_and_nobody_sleeps_for_ever(way: tuple[str, str, str], stress: Path) -> None:
    stressed(stress, way, FRAMES)


@pytest.mark.parametrize("who", ["threads", "processes"])
def test_the_same_holds_under_address_and_undefined_behaviour_sanitizer(who: str, tmp_path: Path) -> None:
    by, flag = sanitizing(tmp_path, "address,undefined")
    program = compiled(HERE / "core_stress.c", tmp_path / "sanitized", "-O1", "-g", flag, "-fno-sanitize-recover=all", by=by)
    stressed(program, (who, "calls", "4"), FRAMES)


ARM_COMPILER, ARM = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"


@pytest.fixture(scope="module")
def arm_stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [program for program in (ARM_COMPILER, ARM) if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} (Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)")
    return compiled(HERE / "core_stress.c", tmp_path_factory.mktemp("core") / "stress", "-O2", "-static", by=ARM_COMPILER)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_same_holds_of_the_code_for_aarch64_under_emulation(way: tuple[str, str, str], arm_stress: Path) -> None:
    """Of the code that a compiler makes for aarch64, not of its processors: on x86-64 the emulator's stores keep their order, as this machine's do."""
    stressed(arm_stress, way, EMULATED_FRAMES, under=(ARM,))


@pytest.mark.parametrize("instruction", [r"stlr\s+x", r"ldap?r\s+x", r"dmb\s+ish$"], ids=["release", "acquire", "fence"])
def test_the_compiler_makes_ordered_instructions_of_the_steps_for_aarch64(instruction: str, tmp_path: Path) -> None:
    by = compiler(ARM_COMPILER, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    text = compiled(HERE / "core_stress.c", tmp_path / "stress.s", "-O2", "-S", by=by).read_text()
    assert re.search(rf"^\s+{instruction}", text, re.MULTILINE)


# --- races ----------------------------------------------------------------------------------------------------------------------------------
# ThreadSanitizer knows C's acquire and release, not its fences: it finds what Q1 to Q3 need, and says nothing of D1, which is the model's to check
# (test_weak_memory.py). It does not see what the compiler makes of memcpy by itself, hence -fno-builtin.

RACES = ("-O1", "-g", "-fno-builtin", "-Wno-tsan")


def watched(folder: Path, include: Path = INCLUDE) -> Path:
    by, flag = sanitizing(folder, "thread")
    return compiled(HERE / "core_stress.c", folder / "watched", *RACES, flag, by=by, include=str(include))


def test_thread_sanitizer_finds_no_race_of_frames(tmp_path: Path) -> None:
    program = watched(tmp_path)
    for what in ("calls", "stream"):
        for depth in ("1", "4"):
            stressed(program, ("threads", what, depth), RACING_FRAMES)


@pytest.mark.parametrize("step", ["PUBLISH", "LOOK", "SAY_TAKEN", "ASK_TAKEN"])
def test_thread_sanitizer_finds_the_race_where_a_step_is_relaxed(step: str, tmp_path: Path) -> None:
    shutil.copytree(INCLUDE, tmp_path / "include")
    word = tmp_path / "include" / "shmbroker" / "word.h"
    spoilt, count = re.subn(rf"(#define SHMBROKER_{step}\(.*memory_order_)\w+", r"\1relaxed", word.read_text())
    assert count == 1
    word.write_text(spoilt)
    done = ran(watched(tmp_path, tmp_path / "include"), "threads", "stream", "4", RACING_FRAMES)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
