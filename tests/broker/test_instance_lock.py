"""One broker for one instance: whoever comes second is refused, until the first is gone, however it went."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shmbroker.broker.broker import Broker
from shmbroker.broker.instance_lock import InstanceLock
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
    InstanceLock(path, "x").release()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_lock_that_was_refused_leaves_no_file_open(tmp_path: Path) -> None:
    first = InstanceLock(tmp_path / "x.lock", "x")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(InstanceInUse):
        InstanceLock(tmp_path / "x.lock", "x")
    assert os.listdir("/proc/self/fd") == before
    first.release()


def test_the_file_stays_when_the_lock_is_released_unless_it_is_removed(tmp_path: Path) -> None:
    lock = InstanceLock(tmp_path / "x.lock", "x")
    lock.release()
    assert (tmp_path / "x.lock").exists()
    lock = InstanceLock(tmp_path / "x.lock", "x")
    lock.remove()
    lock.release()
    assert not (tmp_path / "x.lock").exists()


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
