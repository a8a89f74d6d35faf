"""Segments: made, mapped, refused, closed; who holds one, and what the reaper does about it. With real processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest
import torch

from shmbroker.arena.arena import Arena
from shmbroker.arena.spec import TensorSpec
from shmbroker.errors import BadInput, SegmentError, SharedMemoryFull
from shmbroker.lane.submission_reader import Descriptor, Form
from shmbroker.memory import hold as hold_module
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold, is_held, unlink_if_unheld, unlink_own
from shmbroker.memory.layout import SegmentHeader
from shmbroker.memory.reaper import objects, reap
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from shmbroker.worker.mapped_segment import MappedSegment
from tests.conftest import END_SECONDS, InChild, SegmentOf, StartChild

SMALL = Geometry(arena_bytes=16 * layout.PAGE, channel_count=2, depth=4)
NOBODY = 65534

HOLDER = """
import sys
from shmbroker.memory.segment import Segment
segment = Segment.attach(sys.argv[1], hold=True)
print("held", flush=True)
sys.stdin.read()
"""

FORKED_HOLDER = """
import os, sys
from shmbroker.memory.segment import Segment
segment = Segment.attach(sys.argv[1], hold=True)
if os.fork() == 0:
    print("forked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(program: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the segment ``name`` until its input ends, ready; it is ended with the block."""
    process = subprocess.Popen([sys.executable, "-c", program, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() in ("held\n", "forked\n")
            yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(END_SECONDS)


@pytest.fixture
def name(instance: str) -> Iterator[str]:
    """A name for one segment, taken away afterwards whatever came of it."""
    name = names.segment_name(instance, names.new_id())
    yield name
    unlink_segment(name)


@pytest.fixture
def made(name: str, instance: str) -> Iterator[str]:
    """The name of a small segment that this process holds as its maker."""
    hold = make_segment(name, SMALL, instance=instance, owner="owner", owner_pid=4711)
    yield name
    hold.release()


def _path(name: str) -> str:
    return f"{names.SHM_DIR}{name}"


def _header(name: str) -> SegmentHeader:
    return SegmentHeader.from_buffer_copy(Path(_path(name)).read_bytes()[: layout.PAGE])


def _bytes_of(header: SegmentHeader, field: str) -> bytes:
    place = getattr(SegmentHeader, field)
    return bytes(header)[place.offset : place.offset + place.size]


def _poke(name: str, field: str, value: int | bytes) -> None:
    with open(_path(name), "r+b") as file, mmap.mmap(file.fileno(), layout.PAGE) as page:
        header = SegmentHeader.from_buffer(page)
        setattr(header, field, value)
        del header


def _is_mapped(name: str) -> bool:
    return name.lstrip("/") in Path("/proc/self/maps").read_text()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    """Another user for the length of a block."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


# --- making ----------------------------------------------------------------------------------------------------------------------------


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
    assert not any(Path(_path(made)).read_bytes()[layout.PAGE :])


def test_every_page_of_a_fresh_segment_exists(made: str) -> None:
    found = os.stat(_path(made))
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
    assert stat.S_IMODE(os.stat(_path(made)).st_mode) == 0o600


def test_mode_and_group_are_those_asked_for_whatever_the_umask(name: str, instance: str) -> None:
    before = os.umask(0o077)
    try:
        hold = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1, mode=0o660, gid=os.getegid())
    finally:
        os.umask(before)
    hold.release()
    found = os.stat(_path(name))
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())


def test_a_name_that_is_taken_is_not_made_again(made: str, instance: str) -> None:
    before = Path(_path(made)).read_bytes()
    with pytest.raises(posix_ipc.ExistentialError):
        make_segment(made, SMALL, instance=instance, owner="other", owner_pid=1)
    assert Path(_path(made)).read_bytes() == before


def test_too_small_a_file_system_is_told_with_figures_and_nothing_is_left_behind(name: str, instance: str) -> None:
    room = os.statvfs(names.SHM_DIR)
    free = room.f_bavail * room.f_frsize
    geometry = Geometry(arena_bytes=layout.round_up(free + (1 << 30), layout.PAGE), channel_count=1, depth=1)
    before = _open_files()
    with pytest.raises(
        SharedMemoryFull, match=rf"a segment of {geometry.total_bytes} bytes .*--shm-size=\d+g.*remount,size=\d+m"
    ) as caught:
        make_segment(name, geometry, instance=instance, owner="o", owner_pid=1)
    gibibytes = int(str(caught.value).split("--shm-size=")[1].split("g")[0])
    assert gibibytes * 2**30 > geometry.total_bytes, "the size it proposes would do"
    assert not os.path.exists(_path(name))
    assert _open_files() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EFBIG])
def test_room_that_another_process_took_meanwhile_is_told_the_same_way(
    name: str, instance: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SharedMemoryFull, match=f"{SMALL.total_bytes} bytes"):
        make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert not os.path.exists(_path(name))


def test_any_other_failure_while_making_leaves_nothing_behind_either(name: str, instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = _open_files()
    with pytest.raises(OSError, match="Input/output error"):
        make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert not os.path.exists(_path(name))
    assert _open_files() == before


@pytest.mark.parametrize("too_long", ["owner", "instance"])
def test_an_owner_or_instance_too_long_for_the_header_is_a_value_error_that_leaves_nothing(name: str, instance: str, too_long: str) -> None:
    told = {"owner": "o", "instance": instance}
    room = {"owner": layout.OWNER_BYTES, "instance": layout.INSTANCE_BYTES}[too_long]
    before = _open_files()
    for length in (room, room + 1, 1000):
        with pytest.raises(ValueError, match=f"{'x' * length}.* longer than the header has room for"):
            make_segment(name, SMALL, owner_pid=1, **{**told, too_long: "x" * length})
        assert not os.path.exists(_path(name))
        assert _open_files() == before
    make_segment(name, SMALL, owner_pid=1, **{**told, too_long: "x" * (room - 1)}).release()
    assert getattr(_header(name), too_long) == b"x" * (room - 1)


# --- mapping ---------------------------------------------------------------------------------------------------------------------------


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
    with _as_nobody(), pytest.raises(SegmentError, match=rf"{made} may not be opened by user {NOBODY}.*--group"):
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
    os.truncate(_path(made), nbytes)
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
    before = _open_files()
    for spoilt in {0, 1, good - 1, good + 1, good * 2, good + layout.PAGE, good ^ 1 << 20, largest, largest // 2} - {good}:
        _poke(made, field, spoilt)
        with pytest.raises(SegmentError, match="spoilt header"):
            Segment.attach(made, hold=True)
    assert _open_files() == before
    assert not _is_mapped(made)
    _poke(made, field, good)
    Segment.attach(made, hold=True).close()


@pytest.mark.parametrize("nbytes", [layout.PAGE, SMALL.total_bytes - layout.PAGE, SMALL.total_bytes - 1, SMALL.total_bytes + layout.PAGE])
def test_sizes_that_are_not_those_of_the_file_are_refused(made: str, nbytes: int) -> None:
    os.truncate(_path(made), nbytes)
    with pytest.raises(SegmentError, match=f"spoilt header: .* in {nbytes} bytes"):
        Segment.attach(made, hold=True)


# --- closing ---------------------------------------------------------------------------------------------------------------------------


def test_closing_gives_the_hold_up_and_a_second_time_does_nothing(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    segment = Segment.attach(name, hold=True)
    view = memoryview(segment.map)[: len(layout.MAGIC)]
    assert is_held(_path(name))
    for _ in range(2):
        segment.close()
        assert not is_held(_path(name))
    assert bytes(view) == layout.MAGIC, "the memory is there while anybody can look"


@pytest.mark.parametrize("hold", [True, False])
def test_a_segment_is_unmapped_with_its_last_view_and_leaves_no_file_open(made: str, hold: bool) -> None:
    before = _open_files()
    segment = Segment.attach(made, hold=hold)
    words = segment.words
    assert _is_mapped(made)
    segment.close()
    del segment
    assert _is_mapped(made)
    assert words[0] == int.from_bytes(layout.MAGIC, "little")
    del words
    assert not _is_mapped(made)
    assert _open_files() == before


def _read_a_tensor_after_closing(name: str) -> None:
    segment = Segment.attach(name, hold=True)
    arena = Arena(segment)
    tensor = arena.empty((64,), torch.int64).copy_(torch.arange(64))
    view = tensor[8:]
    segment.close()
    unlink_segment(name)
    del tensor, arena, segment
    assert view.tolist() == list(range(8, 64))
    view.fill_(7)
    assert int(view.sum()) == 7 * 56
    assert _is_mapped(name)
    del view
    assert not _is_mapped(name)


def test_closing_under_a_living_tensor_keeps_it_readable_until_it_dies(made: str, in_child: InChild) -> None:
    """In a child, which alone would die of reading what is no longer mapped."""
    in_child(lambda: _read_a_tensor_after_closing(made))


def test_closing_under_a_living_buffer_keeps_it_readable(made: str) -> None:
    segment = Segment.attach(made, hold=False)
    buffer = memoryview(segment.map)[SMALL.arena_offset :]
    buffer[:3] = b"abc"
    segment.close()
    assert bytes(buffer[:3]) == b"abc"


def _read_a_workers_view_after_closing(name: str) -> None:
    mapped = MappedSegment(Segment.attach(name, hold=False))
    mapped.segment.words[SMALL.arena_offset // 8] = 4711
    view = mapped.view(Descriptor(SMALL.arena_offset, Form(TensorSpec((2, 2), torch.int64), (2, 1), 32, 32)))
    other = torch.frombuffer(mapped.segment.map, dtype=torch.int64)[SMALL.arena_offset // 8 :]
    array = other.numpy()
    mapped.close()
    del mapped
    gc.collect()
    assert _is_mapped(name)
    assert view.tolist() == [[4711, 0], [0, 0]]
    view[1, 1] = 12
    assert (int(other[3]), int(array[3])) == (12, 12)
    del view, other
    assert _is_mapped(name)
    del array
    assert not _is_mapped(name)


def test_a_workers_view_of_a_segment_stays_readable_after_the_segment_is_closed(made: str, in_child: InChild) -> None:
    """In a child, which alone would die of reading what is no longer mapped."""
    in_child(lambda: _read_a_workers_view_after_closing(made))


# --- holding (H1 to H3) ----------------------------------------------------------------------------------------------------------------


def test_a_segment_is_held_from_its_making_on_so_its_client_has_time_to_come(name: str, instance: str) -> None:
    """H1."""
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert reap(instance) == []
    client = Segment.attach(name, hold=True)
    maker.release()
    assert is_held(_path(name))
    assert reap(instance) == []
    client.close()
    assert not is_held(_path(name))
    assert [reaped.name.path for reaped in reap(instance)] == [_path(name)]


def test_what_a_living_process_holds_the_reaper_leaves_and_what_a_killed_one_held_it_unlinks(name: str, instance: str) -> None:
    """H1, H2: however the holder dies."""
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    with holder(HOLDER, name) as process:
        maker.release()
        assert is_held(_path(name))
        assert reap(instance) == []
        assert os.path.exists(_path(name))
        process.kill()
        process.wait(END_SECONDS)
        (reaped,) = reap(instance)
    assert reaped.name.path == _path(name)
    assert reaped.nbytes >= SMALL.total_bytes
    assert not os.path.exists(_path(name))


def test_a_mapping_alone_does_not_keep_the_reaper_away_but_keeps_the_memory(name: str, instance: str) -> None:
    """A worker must not keep a dead client's segment."""
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    worker = Segment.attach(name, hold=False)
    assert worker.hold is None
    worker.map[-1] = 42
    maker.release()
    assert len(reap(instance)) == 1
    assert not os.path.exists(_path(name))
    assert worker.map[-1] == 42
    worker.close()


def test_a_forked_child_does_not_keep_its_dead_parents_segment_alive(name: str, instance: str) -> None:
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    with holder(FORKED_HOLDER, name) as process:
        maker.release()
        assert is_held(_path(name)), "the parent lives"
        process.kill()
        process.wait(END_SECONDS)
        assert process.stdin is not None
        assert process.stdout is not None
        assert not is_held(_path(name)), "the child lives, and holds nothing"
        assert len(reap(instance)) == 1
        process.stdin.close()
        assert process.stdout.read() == "", "the child has ended with its input"


def test_releasing_a_hold_twice_does_nothing(made: str) -> None:
    hold = Hold.on(_path(made))
    hold.release()
    other = os.open(os.devnull, os.O_RDONLY)
    hold.release()
    os.fstat(other)
    os.close(other)


def test_a_hold_that_nobody_has_any_more_gives_its_lock_up(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    before = _open_files()
    hold = Hold.on(_path(name))
    assert is_held(_path(name))
    del hold
    assert not is_held(_path(name))
    assert _open_files() == before


def test_a_hold_in_a_reference_cycle_gives_its_lock_up_when_it_is_collected(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    before = _open_files()
    cycle: list[object] = [Hold.on(_path(name))]
    cycle.append(cycle)
    assert is_held(_path(name))
    del cycle
    gc.collect()
    assert not is_held(_path(name))
    assert _open_files() == before


def test_a_segment_that_nobody_has_any_more_is_held_no_longer(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    before = _open_files()
    segment = Segment.attach(name, hold=True)
    assert is_held(_path(name))
    del segment
    assert not is_held(_path(name))
    assert _open_files() == before


def test_a_released_hold_that_dies_closes_nobody_elses_file(made: str) -> None:
    hold = Hold.on(_path(made))
    hold.release()
    other = os.open(os.devnull, os.O_RDONLY)
    del hold
    os.fstat(other)
    os.close(other)


def test_several_may_hold_at_once_and_the_last_one_counts(name: str, instance: str) -> None:
    holds = [make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1), Hold.on(_path(name)), Hold.on(_path(name))]
    for hold in holds:
        assert unlink_if_unheld(_path(name)) == -1
        hold.release()
    assert unlink_if_unheld(_path(name)) >= SMALL.total_bytes


def test_what_was_reaped_before_it_was_held_is_told_to_the_holder(made: str) -> None:
    """H3."""
    fd = os.open(_path(made), os.O_RDWR)
    unlink_segment(made)
    with pytest.raises(FileNotFoundError, match="unlinked before it could be held"):
        Hold(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def _unlink_before_locking(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Has the reaper come exactly between opening and locking, once."""
    lock = hold_module._lock_shared

    def unlink_first(fd: int) -> None:
        monkeypatch.setattr(hold_module, "_lock_shared", lock)
        os.unlink(path)
        lock(fd)

    monkeypatch.setattr(hold_module, "_lock_shared", unlink_first)


def test_attaching_to_what_is_reaped_in_between_says_connect_again(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H3."""
    before = _open_files()
    _unlink_before_locking(monkeypatch, _path(made))
    with pytest.raises(SegmentError, match="was reaped before it could be held: connect again"):
        Segment.attach(made, hold=True)
    assert _open_files() == before


def test_a_fresh_object_that_the_reaper_meets_before_it_is_held_is_made_again(
    name: str, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H3."""
    _unlink_before_locking(monkeypatch, _path(name))
    hold = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert is_held(_path(name))
    Segment.attach(name, hold=True).close()
    hold.release()


def _reap_until_told(instance: str, flag: str) -> None:
    while os.path.exists(flag):
        reap(instance)


def test_a_reaper_at_work_all_the_time_never_takes_what_is_being_made_or_held(
    instance: str, start_child: StartChild, tmp_path: Path
) -> None:
    """H2, H3, with a real race."""
    flag = tmp_path / "go on"
    flag.touch()
    reaper = start_child(_reap_until_told, instance, str(flag))
    for _ in range(300):
        name = names.segment_name(instance, names.new_id())
        maker = make_segment(name, Geometry(layout.PAGE, 1, 1), instance=instance, owner="o", owner_pid=1)
        client = Segment.attach(name, hold=True)
        maker.release()
        assert os.path.exists(_path(name))
        client.close()
    flag.unlink()
    reaper.join(END_SECONDS)
    assert reaper.exitcode == 0
    reap(instance)
    assert list(objects(instance)) == []


def test_an_unlinked_or_unknown_file_is_held_by_nobody(instance: str) -> None:
    path = _path(names.segment_name(instance, names.new_id()))
    assert not is_held(path)
    assert unlink_if_unheld(path) == -1


def test_unlinking_ones_own_leaves_what_others_hold(made: str) -> None:
    unlink_own(_path(made))
    assert os.path.exists(_path(made))


@pytest.fixture
def reapers_look(name: str, instance: str) -> Iterator[int]:
    """The open file through which somebody has the exclusive lock on a segment that nobody holds."""
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    fd = os.open(_path(name), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield fd
    os.close(fd)


def test_a_hold_that_meets_a_reapers_lock_tries_again_until_it_is_gone(
    name: str, reapers_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            fcntl.flock(reapers_look, fcntl.LOCK_UN)

    monkeypatch.setattr(hold_module.time, "sleep", nap)
    Hold.on(_path(name)).release()
    assert len(naps) == 3


def test_a_lock_that_stands_for_longer_than_any_reapers_is_told_and_nothing_is_kept_open(
    name: str, reapers_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold_module, "LOCK_SECONDS", 0.0)
    before = _open_files()
    with pytest.raises(BlockingIOError):
        Hold.on(_path(name))
    assert _open_files() == before


def test_attaching_under_a_foreign_exclusive_lock_is_told_and_nothing_is_kept_open(
    name: str, reapers_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold_module, "LOCK_SECONDS", 0.0)
    before = _open_files()
    with pytest.raises(SegmentError, match=f"{name} is locked by another process.*try again"):
        Segment.attach(name, hold=True)
    assert _open_files() == before
    assert not _is_mapped(name)
    Segment.attach(name, hold=False).close()
    fcntl.flock(reapers_look, fcntl.LOCK_UN)
    Segment.attach(name, hold=True).close()


# --- the reaper ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def strangers(instance: str) -> Iterator[list[str]]:
    """Unheld files in shared memory that are not ours, though some look much like it."""
    known = names.new_id()
    files = [
        f"strange.{instance}.segment.{known}",
        f"shmbroker.{instance}.segment.{known}.old",
        f"shmbroker.{instance}.segment.{known[:-1]}",
        f"shmbroker.{instance}.weights.{known}",
        f"shmbroker.{instance}.segment.{known[:-1]}G",
        f"Xshmbroker.{instance}.segment.{known}",
        f"sem.sem.shmbroker.{instance}.bell.{known}",
    ]
    for file in files:
        Path(names.SHM_DIR, file).write_bytes(b"mine")
    yield files
    for file in files:
        Path(names.SHM_DIR, file).unlink(missing_ok=True)


def test_the_reaper_leaves_files_alone_that_are_not_ours(strangers: list[str], instance: str) -> None:
    assert reap(instance) == []
    assert all(Path(names.SHM_DIR, file).read_bytes() == b"mine" for file in strangers)


def test_the_reaper_takes_one_instance_or_one_owner_when_told(instance: str) -> None:
    other = f"{instance}-x"
    owners = [names.new_id() for _ in range(3)]
    made = [names.segment_name(instance, owners[0]), names.segment_name(instance, owners[1]), names.segment_name(other, owners[2])]
    try:
        for name in made:
            make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
        assert [found.owner for found in objects(instance)] == sorted(owners[:2])
        assert [reaped.name.owner for reaped in reap(instance, owners[1])] == [owners[1]]
        assert [reaped.name.owner for reaped in reap(instance)] == [owners[0]]
        assert [found.owner for found in objects(other)] == [owners[2]]
        assert {found.owner for found in objects()} >= {owners[2]}
    finally:
        for name in made:
            unlink_segment(name)


def test_the_reaper_takes_bells_as_well_as_segments(instance: str) -> None:
    """H1, H2: every process holds its doorbell."""
    name = names.bell_name(instance, names.new_id())
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600).close()
    path = names.bell_path(name)
    try:
        hold = Hold.on(path)
        assert reap(instance) == []
        hold.release()
        assert [reaped.name.path for reaped in reap(instance)] == [path]
        assert not os.path.exists(path)
    finally:
        Path(path).unlink(missing_ok=True)


def _listening(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


def _link_to(target: Callable[[str], str]) -> Callable[[str], None]:
    return lambda path: os.symlink(target(path), path)


STUMBLING_BLOCKS: dict[str, Callable[[str], None]] = {
    "directory": os.mkdir,
    "FIFO": os.mkfifo,
    "socket": _listening,
    "link to a file that nobody holds": _link_to(lambda path: f"{path}.target"),
    "link to a directory": _link_to(lambda path: os.path.dirname(path)),
    "link to a FIFO": _link_to(lambda path: f"{path}.fifo"),
    "link to nothing": _link_to(lambda path: f"{path}.nothing"),
    "link to itself": _link_to(lambda path: path),
}


@pytest.fixture
def stumbling_block(request: pytest.FixtureRequest, instance: str) -> Iterator[str]:
    """The path of something that is named like an object of ours, and comes before all others in the order of names."""
    kind, what = request.param
    path = {"segment": _path(names.segment_name(instance, "0" * 16)), "bell": names.bell_path(names.bell_name(instance, "0" * 16))}[kind]
    try:
        Path(f"{path}.target").write_bytes(b"mine")
        os.mkfifo(f"{path}.fifo")
        STUMBLING_BLOCKS[what](path)
        yield path
    finally:
        for file in (path, f"{path}.target", f"{path}.fifo"):
            if os.path.isdir(file) and not os.path.islink(file):
                os.rmdir(file)
            elif os.path.lexists(file):
                os.unlink(file)


def _reap_past(path: str, instance: str) -> None:
    before = _open_files()
    assert reap(instance, "0" * 16) == []
    assert not is_held(path)
    assert unlink_if_unheld(path) == -1
    unlink_own(path)
    assert [reaped.name.owner for reaped in reap(instance)] == ["f" * 16]
    assert _open_files() == before


@pytest.mark.parametrize(
    "stumbling_block",
    [pytest.param((kind, what), id=f"{kind}: {what}") for kind in ("segment", "bell") for what in STUMBLING_BLOCKS],
    indirect=True,
)
def test_what_is_no_plain_file_but_named_like_one_of_ours_neither_stops_nor_blocks_the_reaper_and_is_left(
    stumbling_block: str, instance: str, in_child: InChild
) -> None:
    """In a child, which alone would wait for ever for the other end of a FIFO."""
    behind = names.segment_name(instance, "f" * 16)
    before = os.lstat(stumbling_block)
    try:
        make_segment(behind, SMALL, instance=instance, owner="o", owner_pid=1).release()
        in_child(lambda: _reap_past(stumbling_block, instance))
        assert not os.path.exists(_path(behind))
    finally:
        unlink_segment(behind)
    after = os.lstat(stumbling_block)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert Path(f"{stumbling_block}.target").read_bytes() == b"mine"


def test_the_reaper_passes_over_what_belongs_to_another_user(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    with _as_nobody():
        assert reap(instance) == []
    assert os.path.exists(_path(name))


# --- names -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", ["default", "a", "0", "x-1", "a" * 31, "9-"])
def test_instances_of_lower_case_letters_digits_and_dashes_are_taken(instance: str) -> None:
    assert names.check_instance(instance) == instance
    assert len(instance) < layout.INSTANCE_BYTES


@pytest.mark.parametrize("instance", ["", "-a", "A", "a.b", "a/b", "..", "a b", "a\n", "ä", "a_b", "a" * 32])
def test_instances_that_could_not_be_part_of_a_name_are_refused(instance: str) -> None:
    with pytest.raises(BadInput, match="cannot be used: 1 to 31 lower-case letters"):
        names.check_instance(instance)


def test_names_of_segments_and_bells_are_parsed_back() -> None:
    owner = names.new_id()
    segment = names.parse(names.segment_name("my-1", owner).lstrip("/"))
    assert segment is not None
    assert (segment.instance, segment.kind, segment.owner) == ("my-1", "segment", owner)
    assert segment.path == f"/dev/shm/shmbroker.my-1.segment.{owner}"
    bell = names.parse(os.path.basename(names.bell_path(names.bell_name("my-1", owner))))
    assert bell is not None
    assert (bell.instance, bell.kind, bell.owner) == ("my-1", "bell", owner)
    assert bell.path == names.bell_path(names.bell_name("my-1", owner)) == f"/dev/shm/sem.shmbroker.my-1.bell.{owner}"


@pytest.mark.parametrize(
    "file",
    [
        "",
        "shmbroker",
        "shmbroker.default",
        "shmbroker.default.segment.",
        "shmbroker.default.segment.0123456789abcde",
        "shmbroker.default.segment.0123456789abcdef0",
        "shmbroker.default.segment.0123456789ABCDEF",
        "shmbroker.default.other.0123456789abcdef",
        "shmbroker..segment.0123456789abcdef",
        "shmbroker.-.segment.0123456789abcdef",
        "xshmbroker.default.segment.0123456789abcdef",
        "shmbroker.default.segment.0123456789abcdef\n",
        "shmbroker.a.b.segment.0123456789abcdef",
    ],
)
def test_names_that_are_not_ours_are_not_parsed(file: str) -> None:
    assert names.parse(file) is None


def test_ids_are_sixteen_hexadecimal_digits_and_do_not_repeat() -> None:
    ids = {names.new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in ids)
