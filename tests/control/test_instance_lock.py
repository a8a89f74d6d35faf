"""One broker for one instance: whoever comes second is refused, until the first is gone, however it went."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

from shmbroker.broker.broker import Broker
from shmbroker.control.instance_lock import InstanceLock
from shmbroker.errors import InstanceInUse
from tests.conftest import StartChild
from tests.processes import wait_until


def test_a_second_lock_of_one_instance_is_refused_and_names_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first = InstanceLock(path, "x")
    with pytest.raises(InstanceInUse, match=rf"a broker already serves instance 'x' \(pid {os.getpid()}\)"):
        InstanceLock(path, "x")
    InstanceLock(tmp_path / "y.lock", "y").release()
    first.release()
    first.release()
    again = InstanceLock(path, "x")
    assert path.stat().st_mode & 0o777 == 0o600
    again.release()


def test_a_lock_that_was_refused_leaves_no_file_open(tmp_path: Path) -> None:
    first = InstanceLock(tmp_path / "x.lock", "x")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(InstanceInUse):
        InstanceLock(tmp_path / "x.lock", "x")
    assert os.listdir("/proc/self/fd") == before
    first.release()


def test_the_file_goes_with_the_lock_but_not_one_that_was_made_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    InstanceLock(path, "x").release()
    assert not path.exists()
    lock = InstanceLock(path, "x")
    path.unlink()  # somebody tidied up
    another = InstanceLock(path, "x")
    lock.release()
    assert path.exists()
    another.release()
    assert not path.exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step between opening and locking, in which the one before lets go."""
    path = tmp_path / "x.lock"
    before = InstanceLock(path, "x")
    lock_file = fcntl.flock
    locked: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not locked:
            before.release()
        locked.append(fd)
        lock_file(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    after = InstanceLock(path, "x")
    assert len(locked) == 2, "the first had no name any more"
    with pytest.raises(InstanceInUse):
        InstanceLock(path, "x")
    after.release()


def test_of_many_that_come_and_go_at_once_one_has_the_lock_at_any_time(tmp_path: Path, start_child: StartChild) -> None:
    path, inside = tmp_path / "x.lock", tmp_path / "inside"

    def come_and_go() -> None:
        had = 0
        while had < 200:
            try:
                lock = InstanceLock(path, "x")
            except InstanceInUse:
                continue
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            lock.release()
            had += 1

    children = [start_child(come_and_go) for _ in range(4)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert os.listdir(tmp_path) == []


def test_a_killed_process_gives_the_instance_up(tmp_path: Path, start_child: StartChild) -> None:
    path = tmp_path / "x.lock"

    def sit() -> None:
        lock = InstanceLock(path, "x")
        signal.pause()
        lock.release()

    child = start_child(sit)
    wait_until(lambda: path.exists() and path.read_text() == f"{child.pid}\n")
    with pytest.raises(InstanceInUse, match=rf"\(pid {child.pid}\)"):
        InstanceLock(path, "x")
    child.kill()
    child.join()
    InstanceLock(path, "x").release()


def test_a_second_broker_of_one_instance_is_refused_before_it_touches_the_socket(
    instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder))
    monkeypatch.setenv("SHMBROKER_CONTROL", "ipc")
    short_folder.chmod(0o700)
    first = Broker(instance, until_exit=1 << 30)  # no such process: it is to end at once
    socket = short_folder / f"{instance}.sock"
    before = socket.stat()
    with pytest.raises(InstanceInUse):
        Broker(instance)
    assert socket.stat() == before
    first.serve()
    assert not socket.exists()
