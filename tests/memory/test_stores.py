"""Segments in a folder or in one file, told by ``$SHMBROKER_SEGMENTS``: as in POSIX shared memory, between real processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.memory import names
from shmbroker.memory.reaper import objects
from tests.processes import run, running, wait_until, worker_process

CLIENT = "import shmbroker, time; client = shmbroker.connect(arena='4M'); print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of segments, on the file system of the test's own folder."""
    folder = tmp_path / "segments"
    folder.mkdir()
    monkeypatch.setenv("SHMBROKER_SEGMENTS", f"path:{folder}")
    return folder


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain file of 64 MiB in the place of a device's memory."""
    file = tmp_path / "memory"
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, 64 << 20)
    monkeypatch.setenv("SHMBROKER_SEGMENTS", f"path:{file}")
    return file


@pytest.fixture
def instance_of(segments: Path) -> Iterator[str]:
    with shmbroker.local_broker() as broker:
        yield broker.instance


def call(lane: str) -> None:
    with shmbroker.connect(arena="16M") as client:
        double = client.channel("test", lane=lane).bind("double")
        x = client.empty((512, 512), torch.float32).normal_()
        for _ in range(3):
            assert torch.equal(double(x), x * 2)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_calls_go_through_segments_in_a_folder_which_is_empty_afterwards(segments: Path, instance_of: str, lane: str) -> None:
    with worker_process():
        with shmbroker.connect(arena="4M") as client:
            assert len(list(segments.iterdir())) == 1
            assert not [one for one in objects(instance_of) if one.kind == names.SEGMENT and one.folder == names.SHM_DIR]
            client.empty((8,), torch.float32)
        call(lane)
    assert not list(segments.iterdir())


def test_what_a_killed_client_leaves_in_a_folder_is_reaped(segments: Path, instance_of: str) -> None:
    with running(sys.executable, "-c", CLIENT) as client:
        wait_until(lambda: bool(list(segments.iterdir())))
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
    wait_until(lambda: not list(segments.iterdir()))


def test_one_file_holds_one_segment_after_another(one_file: Path) -> None:
    with shmbroker.local_broker(), worker_process():
        call("shm")
        with running(sys.executable, "-c", CLIENT) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            assert _refused()
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
        call("shm")  # over what the dead one left
        with pytest.raises(shmbroker.ShmBrokerError):
            shmbroker.connect(arena="100T")
    assert one_file.stat().st_size == 64 << 20


def _refused() -> bool:
    try:
        shmbroker.connect(arena="4M").close()
    except shmbroker.ShmBrokerError as error:
        return "holds one segment, and a client has it" in str(error)
    return False


@pytest.mark.parametrize(
    ("told", "says"),
    [("path:relative", "an absolute path"), ("/dev/shm", "give path:"), ("path:/no/such/folder", "mount it, or make the folder")],
)
def test_a_place_that_cannot_be_is_told_when_the_broker_starts(told: str, says: str) -> None:
    done = run(sys.executable, "-m", "shmbroker", "serve", "--instance", "nowhere", SHMBROKER_SEGMENTS=told)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_was_told_another_place_says_what_to_look_at(instance_of: str) -> None:
    refused = pytest.raises(shmbroker.ShmBrokerError, match=r"\$SHMBROKER_SEGMENTS is not the same")
    with worker_process(SHMBROKER_SEGMENTS=""), shmbroker.connect(arena="4M") as client, refused:
        client.channel("test")
