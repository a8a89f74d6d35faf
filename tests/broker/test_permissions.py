"""Who is another user, and not in the group, can do nothing: neither attach, nor connect, nor ring. Tried with real second and third users.

The other users' processes are forked from this one: they may not be able to read the interpreter's own files, and need not.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.broker.broker import Broker
from shmbroker.control import endpoint as endpoints
from shmbroker.control.keys import Keys, make_keys
from shmbroker.control.status import ask
from shmbroker.lane.doorbell import SemaphoreBell
from shmbroker.memory import names
from shmbroker.memory.hold import Hold, is_held
from shmbroker.memory.reaper import objects, reap
from shmbroker.memory.segment import Segment
from tests.conftest import InChild, StartChild
from tests.namespaces import become, possible
from tests.peers import LANES
from tests.processes import broker_process, wait_until, worker_process

MEMBER, OTHER_MEMBER, STRANGER = 65531, 65532, 65533
"""Users without an entry in /etc/passwd, whom nobody else is."""

GROUP = 65530

pytestmark = pytest.mark.skipif(not possible(become, STRANGER, STRANGER, (GROUP,)), reason="becoming another user needs root")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, instance: str) -> Iterator[Path]:
    """A folder for sockets in one that everybody may enter, so that what keeps others out is its own mode."""
    parent = Path(tempfile.mkdtemp(prefix="shmbroker-", dir="/tmp"))
    parent.chmod(0o755)
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(parent / "run"))
    monkeypatch.setenv("SHMBROKER_INSTANCE", instance)
    monkeypatch.setenv("SHMBROKER_CONTROL", "ipc")
    yield parent / "run"
    shutil.rmtree(parent)


def refused(attempt: Callable[..., object], *arguments: object, by: type[BaseException] = PermissionError, **named: object) -> str:
    """The words with which ``attempt(*arguments, **named)`` was refused."""
    with pytest.raises(by) as caught:
        attempt(*arguments, **named)
    return str(caught.value)


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
        knocking.connect(str(path))


def check_that_nothing_can_be_done(instance: str, sockets: list[Path]) -> None:
    """By this user, to a world with a broker, a worker and a client that run."""
    there = list(objects(instance))
    assert sorted(name.kind for name in there) == ["bell", "bell", "segment"]
    for name in there:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            refused(os.open, name.path, flags)
        refused(os.unlink, name.path)
        refused(os.truncate, name.path, 0)
        refused(os.chmod, name.path, 0o666)
        refused(os.rename, name.path, name.path + "x")
        refused(Hold.on, name.path)
        refused(is_held, name.path)
        posix_name = "/" + name.file.removeprefix("sem.")
        if name.kind == names.SEGMENT:
            for hold in (True, False):
                told = refused(Segment.attach, posix_name, hold=hold, by=shmbroker.SegmentError)
                assert f"may not be opened by user {os.geteuid()}" in told
            refused(posix_ipc.unlink_shared_memory, posix_name, by=posix_ipc.PermissionsError)
        else:
            told = refused(SemaphoreBell, posix_name, by=shmbroker.ChannelError)
            assert f"may not be opened by user {os.geteuid()}" in told
            assert "--group" in told
            refused(posix_ipc.unlink_semaphore, posix_name, by=posix_ipc.PermissionsError)
    assert reap(instance) == []
    for path in sockets:
        refused(connect, path)
    told = refused(shmbroker.connect, instance, arena="1M", by=shmbroker.BrokerUnreachable)
    assert f"user {os.geteuid()} may not connect to ipc://" in told
    assert "--group" in told
    refused(ask, instance, by=shmbroker.BrokerUnreachable)
    refused(shmbroker.Worker("stolen", instance=instance).serve, by=shmbroker.BrokerUnreachable)
    assert list(objects(instance)) == there


def worker_and_broker_sockets(runtime: Path, instance: str) -> list[Path]:
    sockets = [endpoints.socket_path(instance), *(path for _, path in endpoints.worker_sockets(runtime, instance))]
    assert len(sockets) == 3, "the broker's, and the worker's for control and for lane zmq"
    return sockets


def test_another_user_can_do_nothing(runtime: Path, instance: str, in_child: InChild) -> None:
    with broker_process(instance), worker_process(), shmbroker.connect(arena="1M") as client:
        double = client.channel("test").bind("double")
        x = client.empty((4,)).fill_(3.0)
        sockets = worker_and_broker_sockets(runtime, instance)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in [*sockets, *(Path(name.path) for name in objects(instance))]}
        assert modes == {0o600}
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700

        def as_stranger() -> None:
            become(STRANGER, STRANGER, (GROUP,))
            refused(os.listdir, runtime)
            check_that_nothing_can_be_done(instance, sockets)

        in_child(as_stranger)
        runtime.chmod(0o755)  # the folder's mode is not all that keeps others out

        def as_stranger_within() -> None:
            become(STRANGER, STRANGER)
            os.listdir(runtime)
            check_that_nothing_can_be_done(instance, sockets)

        in_child(as_stranger_within)
        assert double(x).tolist() == [6.0] * 4


def serve_tripling() -> None:
    worker = shmbroker.Worker("tripling")

    @worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
    def triple(x: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.mul(x, 3, out=out)

    worker.serve()


def test_users_of_one_group_work_together_and_others_can_do_nothing(
    runtime: Path, instance: str, in_child: InChild, start_child: StartChild
) -> None:
    """Broker, worker and client belong to three users."""

    def as_worker() -> None:
        become(OTHER_MEMBER, OTHER_MEMBER, (GROUP,))
        serve_tripling()

    def as_member() -> None:
        become(MEMBER, MEMBER, (GROUP,))
        with shmbroker.connect(arena="1M") as client:
            for lane, doorbell in LANES:
                channel = client.channel("tripling", lane=lane, doorbell=doorbell)
                triple = channel.bind("triple")
                x = client.empty((1000,)).normal_()
                for _ in range(20):
                    assert torch.equal(triple(x), x * 3)
                assert len(ask(None).peers) == 2
                channel.close()

    def as_sitting_member() -> None:
        become(MEMBER, MEMBER, (GROUP,))
        with shmbroker.connect(arena="1M"):
            signal.pause()

    def as_stranger() -> None:
        become(STRANGER, STRANGER)
        check_that_nothing_can_be_done(instance, sockets)

    def kinds() -> list[str]:
        return sorted(name.kind for name in objects(instance))

    with broker_process(instance, "--group", str(GROUP)):
        worker = start_child(as_worker)
        wait_until(lambda: bool(ask(None).peers))
        in_child(as_member)
        wait_until(lambda: kinds() == ["bell"])  # what the member could not unlink itself, being the broker's, the broker reaped
        member = start_child(as_sitting_member)
        wait_until(lambda: len(ask(None).peers) == 2)
        sockets = worker_and_broker_sockets(runtime, instance)
        for path in [*sockets, *(Path(name.path) for name in objects(instance))]:
            found = path.stat()
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, GROUP), path
        in_child(as_stranger)
        runtime.chmod(stat.S_IMODE(runtime.stat().st_mode) | 0o005)
        in_child(as_stranger)
        member.kill()
        worker.terminate()
        worker.join()
        assert worker.exitcode == 0
        wait_until(lambda: not kinds() and len(list(runtime.glob("*.sock"))) == 1)


def test_a_member_of_the_group_cannot_take_away_what_is_anothers(
    runtime: Path, instance: str, in_child: InChild, start_child: StartChild
) -> None:
    def as_member() -> None:
        become(MEMBER, MEMBER, (GROUP,))
        for path in [*worker_and_broker_sockets(runtime, instance), *(Path(name.path) for name in objects(instance))]:
            refused(path.unlink)
            refused(path.chmod, 0o666)
        assert reap(instance) == [], "held by the living, and not a member's to unlink"
        refused(os.rename, runtime / f"{instance}.lock", runtime / "x")
        refused(os.open, runtime / f"{instance}.lock", os.O_RDWR)

    with broker_process(instance, "--group", str(GROUP)), worker_process(), shmbroker.connect(arena="1M") as client:
        in_child(as_member)
        assert client.channel("test").bind("double")(torch.ones(1)).item() == 2.0


def test_a_broker_of_a_user_who_is_not_in_the_group_is_refused(runtime: Path, instance: str, in_child: InChild) -> None:
    runtime.parent.chmod(0o777)

    def as_stranger() -> None:
        become(STRANGER, STRANGER)
        assert f"user {STRANGER} is not in group {GROUP}" in refused(Broker, instance, GROUP, by=shmbroker.BadInput)

    in_child(as_stranger)


def test_a_folder_for_sockets_that_is_anothers_is_refused(runtime: Path, instance: str, in_child: InChild) -> None:
    """Who made it could take the sockets away and put his own there."""
    runtime.mkdir(mode=0o777)
    runtime.chmod(0o777)

    def as_stranger() -> None:
        become(STRANGER, STRANGER)
        assert f"{runtime} belongs to user 0, not to {STRANGER}" in refused(Broker, instance, by=shmbroker.BadInput)

    in_child(as_stranger)


def test_another_user_cannot_use_the_keys(runtime: Path, in_child: InChild) -> None:
    folder = runtime.parent / "keys"
    make_keys(folder)

    def as_stranger() -> None:
        become(STRANGER, STRANGER)
        refused((folder / "member.key_secret").read_bytes)
        assert f"cannot be read by user {STRANGER}" in refused(Keys.load, folder, by=shmbroker.BadInput)

    in_child(as_stranger)
    for path in (folder, *folder.iterdir()):
        os.chown(path, MEMBER, MEMBER)
    with pytest.raises(shmbroker.BadInput, match=f"belongs to user {MEMBER}, not to 0"):
        Keys.load(folder)
