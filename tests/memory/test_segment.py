"""Segments: made, mapped, refused, closed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import time
from pathlib import Path

import posix_ipc
import pytest

from shmbroker.errors import SegmentError, SharedMemoryFull
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import is_held
from shmbroker.memory.layout import SegmentHeader
from shmbroker.memory.segment import Segment, make_segment
from tests.conftest import SegmentOf
from tests.memory.conftest import SMALL
from tests.shared_memory import NOBODY, as_nobody, is_mapped, open_files, path_of


def _header(name: str) -> SegmentHeader:
    return SegmentHeader.from_buffer_copy(Path(path_of(name)).read_bytes()[: layout.PAGE])


def _bytes_of(header: SegmentHeader, field: str) -> bytes:
    place = getattr(SegmentHeader, field)
    return bytes(header)[place.offset : place.offset + place.size]


def _poke(name: str, field: str, value: int | bytes) -> None:
    with open(path_of(name), "r+b") as file, mmap.mmap(file.fileno(), layout.PAGE) as page:
        header = SegmentHeader.from_buffer(page)
        setattr(header, field, value)
        del header


# --- making ------------------------------------------------------------------------------------------------------------------------------


def test_header_of_a_fresh_segment_tells_its_sizes_and_whose_it_is(made: str, instance: str) -> None:
    header = _header(made)
    assert (header.magic, header.version, header.byte_order) == (layout.MAGIC, layout.LAYOUT_VERSION, layout.BYTE_ORDER_MARK)
    assert (header.total_bytes, header.arena_offset, header.arena_bytes) == (SMALL.total_bytes, SMALL.arena_offset, SMALL.arena_bytes)
    assert (header.channels_offset, header.channel_bytes) == (SMALL.channels_offset, SMALL.channel_bytes)
    assert (header.channel_count, header.alignment) == (2, 256)
    assert (header.submission_depth, header.completion_depth) == (4, 4)
    assert (header.submission_slot_bytes, header.completion_slot_bytes) == (2048, 1024)
    assert (header.instance, header.owner) == (instance.encode(), b"owner")
    assert (header.maker_pid, header.owner_pid) == (os.getpid(), 4711)
    assert header.made_at_ns > 0
    assert header.client_sleeping == 0


def test_all_of_a_fresh_segment_but_its_header_is_zero(made: str) -> None:
    assert not any(Path(path_of(made)).read_bytes()[layout.PAGE :])


def test_every_page_of_a_fresh_segment_exists(made: str) -> None:
    found = os.stat(path_of(made))
    assert found.st_size == SMALL.total_bytes
    assert found.st_blocks * 512 >= SMALL.total_bytes


def test_version_is_the_last_field_of_the_header_to_be_written(name: str, instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1, looked at when the last of the other fields is about to be written."""
    seen: list[SegmentHeader] = []

    def look() -> int:
        seen.append(_header(name))
        with pytest.raises(SegmentError, match="still being made"):
            Segment.attach(name, hold=False)
        return 1

    monkeypatch.setattr(time, "time_ns", look)
    hold = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    (before,) = seen
    after = _header(name)
    differing = [field for field, *_ in SegmentHeader._fields_ if _bytes_of(before, field) != _bytes_of(after, field)]
    assert differing == ["version", "made_at_ns"]
    hold.release()


def test_a_segment_belongs_to_its_user_alone_unless_told_otherwise(made: str) -> None:
    assert stat.S_IMODE(os.stat(path_of(made)).st_mode) == 0o600


def test_mode_and_group_are_those_asked_for_whatever_the_umask(name: str, instance: str) -> None:
    before = os.umask(0o077)
    try:
        hold = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1, mode=0o660, gid=os.getegid())
    finally:
        os.umask(before)
    hold.release()
    found = os.stat(path_of(name))
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())


def test_a_name_that_is_taken_is_not_made_again(made: str, instance: str) -> None:
    before = Path(path_of(made)).read_bytes()
    with pytest.raises(posix_ipc.ExistentialError):
        make_segment(made, SMALL, instance=instance, owner="other", owner_pid=1)
    assert Path(path_of(made)).read_bytes() == before


def test_too_small_a_file_system_is_told_with_figures_and_nothing_is_left_behind(name: str, instance: str) -> None:
    room = os.statvfs(names.SHM_DIR)
    free = room.f_bavail * room.f_frsize
    geometry = Geometry(arena_bytes=layout.round_up(free + (1 << 30), layout.PAGE), channel_count=1, depth=1)
    before = open_files()
    with pytest.raises(
        SharedMemoryFull, match=rf"a segment of {geometry.total_bytes} bytes .*--shm-size=\d+g.*remount,size=\d+m"
    ) as caught:
        make_segment(name, geometry, instance=instance, owner="o", owner_pid=1)
    gibibytes = int(str(caught.value).split("--shm-size=")[1].split("g")[0])
    assert gibibytes * 2**30 > geometry.total_bytes, "the size it proposes would do"
    assert not os.path.exists(path_of(name))
    assert open_files() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EFBIG])
def test_room_that_another_process_took_meanwhile_is_told_the_same_way(
    name: str, instance: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SharedMemoryFull, match=f"{SMALL.total_bytes} bytes"):
        make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert not os.path.exists(path_of(name))


def test_any_other_failure_while_making_leaves_nothing_behind_either(name: str, instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = open_files()
    with pytest.raises(OSError, match="Input/output error"):
        make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert not os.path.exists(path_of(name))
    assert open_files() == before


@pytest.mark.parametrize("too_long", ["owner", "instance"])
def test_an_owner_or_instance_too_long_for_the_header_is_a_value_error_that_leaves_nothing(name: str, instance: str, too_long: str) -> None:
    told = {"owner": "o", "instance": instance}
    room = {"owner": layout.OWNER_BYTES, "instance": layout.INSTANCE_BYTES}[too_long]
    before = open_files()
    for length in (room, room + 1, 1000):
        with pytest.raises(ValueError, match=f"{'x' * length}.* longer than the header has room for"):
            make_segment(name, SMALL, owner_pid=1, **{**told, too_long: "x" * length})
        assert not os.path.exists(path_of(name))
        assert open_files() == before
    make_segment(name, SMALL, owner_pid=1, **{**told, too_long: "x" * (room - 1)}).release()
    assert getattr(_header(name), too_long) == b"x" * (room - 1)


# --- mapping -----------------------------------------------------------------------------------------------------------------------------


def test_two_mappings_of_a_segment_are_the_same_memory(made: str) -> None:
    one, other = Segment.attach(made, hold=True), Segment.attach(made, hold=False)
    try:
        assert (one.geometry, one.owner, one.name) == (SMALL, "owner", made)
        assert len(one.map) == SMALL.total_bytes
        one.map[SMALL.arena_offset : SMALL.arena_offset + 5] = b"hello"
        assert other.map[SMALL.arena_offset : SMALL.arena_offset + 5] == b"hello"
    finally:
        one.close()
        other.close()


def test_words_are_the_map_in_64_bit_pieces(segment_of: SegmentOf) -> None:
    segment = segment_of(SMALL)
    word = SMALL.arena_offset // 8 + 3
    segment.words[word] = 0x1122334455667788
    assert segment.map[word * 8 : word * 8 + 8] == bytes.fromhex("8877665544332211")
    assert len(segment.words) * 8 == SMALL.total_bytes


def test_a_segment_that_is_gone_is_told_so(name: str) -> None:
    for hold in (True, False):
        with pytest.raises(SegmentError, match=rf"{name} does not exist .*connect again"):
            Segment.attach(name, hold=hold)


def test_another_users_segment_is_told_with_the_way_out(made: str) -> None:
    with as_nobody(), pytest.raises(SegmentError, match=rf"{made} may not be opened by user {NOBODY}.*--group"):
        Segment.attach(made, hold=True)


def test_version_0_means_still_being_made(made: str) -> None:
    """L1; whatever else the header says already."""
    _poke(made, "version", 0)
    with pytest.raises(SegmentError, match=f"{made} is still being made: try again"):
        Segment.attach(made, hold=True)
    _poke(made, "magic", b"")
    with pytest.raises(SegmentError, match="still being made"):
        Segment.attach(made, hold=True)


@pytest.mark.parametrize("nbytes", [0, 1, layout.PAGE - 1])
def test_an_object_without_a_whole_header_is_still_being_made(made: str, nbytes: int) -> None:
    """L1."""
    os.truncate(path_of(made), nbytes)
    with pytest.raises(SegmentError, match=rf"still being made \({nbytes} bytes so far\)"):
        Segment.attach(made, hold=True)


@pytest.mark.parametrize("version", [layout.LAYOUT_VERSION + 1, 4711, 0xFFFFFFFF])
def test_another_layout_version_is_refused_and_both_are_named(made: str, version: int) -> None:
    _poke(made, "version", version)
    with pytest.raises(SegmentError, match=rf"layout version {version}, this program speaks {layout.LAYOUT_VERSION}"):
        Segment.attach(made, hold=True)


@pytest.mark.parametrize(("field", "value"), [("magic", b"ELSEWISE"), ("byte_order", 0x04030201)])
def test_what_is_not_ours_is_refused(made: str, field: str, value: int | bytes) -> None:
    _poke(made, field, value)
    with pytest.raises(SegmentError, match="is not one of shmbroker's"):
        Segment.attach(made, hold=True)


SIZES = [
    "total_bytes",
    "arena_offset",
    "arena_bytes",
    "statistics_offset",
    "statistics_bytes",
    "channels_offset",
    "channel_bytes",
    "channel_count",
    "alignment",
    "submission_depth",
    "submission_slot_bytes",
    "completion_depth",
    "completion_slot_bytes",
]


def test_every_size_in_the_header_is_mutated_below() -> None:
    numbers = {name for name, kind, *_ in SegmentHeader._fields_ if kind in (ctypes.c_uint32, ctypes.c_uint64)}
    others = {"version", "byte_order", "maker_pid", "owner_pid", "made_at_ns", "client_sleeping"}
    assert set(SIZES) == numbers - others


@pytest.mark.parametrize("field", SIZES)
def test_a_spoilt_size_is_refused_and_nothing_is_kept_open(made: str, field: str) -> None:
    good = int(getattr(_header(made), field))
    largest = (1 << 8 * getattr(SegmentHeader, field).size) - 1
    before = open_files()
    for spoilt in {0, 1, good - 1, good + 1, good * 2, good + layout.PAGE, good ^ 1 << 20, largest, largest // 2} - {good}:
        _poke(made, field, spoilt)
        with pytest.raises(SegmentError, match="spoilt header"):
            Segment.attach(made, hold=True)
    assert open_files() == before
    assert not is_mapped(made)
    _poke(made, field, good)
    Segment.attach(made, hold=True).close()


def test_a_segment_of_another_instance_is_refused(made: str, instance: str) -> None:
    """As in one file that two brokers make their segments in."""
    with Path(path_of(made)).open("r+b") as file:
        file.seek(SegmentHeader.instance.offset)
        file.write(b"other\0")
    for hold in (True, False):
        with pytest.raises(SegmentError, match=f"segment {made} was made for instance 'other.*': two brokers share a file"):
            Segment.attach(made, hold=hold)


@pytest.mark.parametrize("nbytes", [layout.PAGE, SMALL.total_bytes - layout.PAGE, SMALL.total_bytes - 1, SMALL.total_bytes + layout.PAGE])
def test_sizes_that_are_not_those_of_the_file_are_refused(made: str, nbytes: int) -> None:
    os.truncate(path_of(made), nbytes)
    with pytest.raises(SegmentError, match=f"spoilt header: .* in {nbytes} bytes"):
        Segment.attach(made, hold=True)


# --- closing -----------------------------------------------------------------------------------------------------------------------------


def test_closing_gives_the_hold_up_and_a_second_time_does_nothing(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    segment = Segment.attach(name, hold=True)
    view = memoryview(segment.map)[: len(layout.MAGIC)]
    assert is_held(path_of(name))
    for _ in range(2):
        segment.close()
        assert not is_held(path_of(name))
    assert bytes(view) == layout.MAGIC, "the memory is there while anybody can look"


@pytest.mark.parametrize("hold", [True, False])
def test_a_segment_is_unmapped_with_its_last_view_and_leaves_no_file_open(made: str, hold: bool) -> None:
    before = open_files()
    segment = Segment.attach(made, hold=hold)
    words = segment.words
    assert is_mapped(made)
    segment.close()
    del segment
    assert is_mapped(made)
    assert words[0] == int.from_bytes(layout.MAGIC, "little")
    del words
    assert not is_mapped(made)
    assert open_files() == before


def test_closing_under_a_living_buffer_keeps_it_readable(made: str) -> None:
    segment = Segment.attach(made, hold=False)
    buffer = memoryview(segment.map)[SMALL.arena_offset :]
    buffer[:3] = b"abc"
    segment.close()
    assert bytes(buffer[:3]) == b"abc"


def test_a_segment_that_nobody_has_any_more_is_held_no_longer(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    before = open_files()
    segment = Segment.attach(name, hold=True)
    assert is_held(path_of(name))
    del segment
    assert not is_held(path_of(name))
    assert open_files() == before
