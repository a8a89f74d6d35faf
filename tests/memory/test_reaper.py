"""The reaper: unlinks what nobody holds, and stumbles over nothing else that lies in shared memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold, is_held, unlink_if_unheld, unlink_own
from shmbroker.memory.reaper import objects, reap
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from tests.conftest import END_SECONDS, InChild, StartChild
from tests.memory.conftest import SMALL
from tests.shared_memory import as_nobody, open_files, path_of


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
        assert os.path.exists(path_of(name))
        client.close()
    flag.unlink()
    reaper.join(END_SECONDS)
    assert reaper.exitcode == 0
    reap(instance)
    assert list(objects(instance)) == []


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
    path = {"segment": path_of(names.segment_name(instance, "0" * 16)), "bell": names.bell_path(names.bell_name(instance, "0" * 16))}[kind]
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
    before = open_files()
    assert reap(instance, "0" * 16) == []
    assert not is_held(path)
    assert unlink_if_unheld(path) == -1
    unlink_own(path)
    assert [reaped.name.owner for reaped in reap(instance)] == ["f" * 16]
    assert open_files() == before


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
        assert not os.path.exists(path_of(behind))
    finally:
        unlink_segment(behind)
    after = os.lstat(stumbling_block)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert Path(f"{stumbling_block}.target").read_bytes() == b"mine"


def test_the_reaper_passes_over_what_belongs_to_another_user(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    with as_nobody():
        assert reap(instance) == []
    assert os.path.exists(path_of(name))
