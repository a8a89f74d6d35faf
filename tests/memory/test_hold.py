"""Holding: what a living process uses is locked, by itself or by the broker, and nobody else's is. Invariants H1 to H4."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from shmbroker.errors import SegmentError
from shmbroker.memory import hold as hold_module
from shmbroker.memory import names
from shmbroker.memory.hold import Hold, HoldWatch, is_held, unlink_if_unheld, unlink_own
from shmbroker.memory.reaper import reap
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from tests.conftest import END_SECONDS
from tests.memory.conftest import SMALL
from tests.shared_memory import is_mapped, open_files, path_of

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


# --- who holds (H1, H2) ------------------------------------------------------------------------------------------------------------------


def test_a_segment_is_held_from_its_making_on_so_its_client_has_time_to_come(name: str, instance: str) -> None:
    """H1."""
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert reap(instance) == []
    client = Segment.attach(name, hold=True)
    maker.release()
    assert is_held(path_of(name))
    assert reap(instance) == []
    client.close()
    assert not is_held(path_of(name))
    assert [reaped.name.path for reaped in reap(instance)] == [path_of(name)]


def test_what_a_living_process_holds_the_reaper_leaves_and_what_a_killed_one_held_it_unlinks(name: str, instance: str) -> None:
    """H1, H2: however the holder dies."""
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    with holder(HOLDER, name) as process:
        maker.release()
        assert is_held(path_of(name))
        assert reap(instance) == []
        assert os.path.exists(path_of(name))
        process.kill()
        process.wait(END_SECONDS)
        (reaped,) = reap(instance)
    assert reaped.name.path == path_of(name)
    assert reaped.nbytes >= SMALL.total_bytes
    assert not os.path.exists(path_of(name))


def test_a_mapping_alone_does_not_keep_the_reaper_away_but_keeps_the_memory(name: str, instance: str) -> None:
    """A worker must not keep a dead client's segment."""
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    worker = Segment.attach(name, hold=False)
    assert worker.hold is None
    worker.map[-1] = 42
    maker.release()
    assert len(reap(instance)) == 1
    assert not os.path.exists(path_of(name))
    assert worker.map[-1] == 42
    worker.close()


def test_a_forked_child_does_not_keep_its_dead_parents_segment_alive(name: str, instance: str) -> None:
    maker = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    with holder(FORKED_HOLDER, name) as process:
        maker.release()
        assert is_held(path_of(name)), "the parent lives"
        process.kill()
        process.wait(END_SECONDS)
        assert process.stdin is not None
        assert process.stdout is not None
        assert not is_held(path_of(name)), "the child lives, and holds nothing"
        assert len(reap(instance)) == 1
        process.stdin.close()
        assert process.stdout.read() == "", "the child has ended with its input"


def test_several_may_hold_at_once_and_the_last_one_counts(name: str, instance: str) -> None:
    holds = [make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1), Hold.on(path_of(name)), Hold.on(path_of(name))]
    for hold in holds:
        assert unlink_if_unheld(path_of(name)) == -1
        hold.release()
    assert unlink_if_unheld(path_of(name)) >= SMALL.total_bytes


def test_an_unlinked_or_unknown_file_is_held_by_nobody(instance: str) -> None:
    path = path_of(names.segment_name(instance, names.new_id()))
    assert not is_held(path)
    assert unlink_if_unheld(path) == -1


def test_unlinking_ones_own_leaves_what_others_hold(made: str) -> None:
    unlink_own(path_of(made))
    assert os.path.exists(path_of(made))


# --- giving a hold up --------------------------------------------------------------------------------------------------------------------


def test_releasing_a_hold_twice_does_nothing(made: str) -> None:
    hold = Hold.on(path_of(made))
    hold.release()
    other = os.open(os.devnull, os.O_RDONLY)
    hold.release()
    os.fstat(other)
    os.close(other)


def test_a_hold_that_nobody_has_any_more_gives_its_lock_up(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    before = open_files()
    hold = Hold.on(path_of(name))
    assert is_held(path_of(name))
    del hold
    assert not is_held(path_of(name))
    assert open_files() == before


def test_a_hold_in_a_reference_cycle_gives_its_lock_up_when_it_is_collected(name: str, instance: str) -> None:
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    gc.collect()  # what other tests have left
    before = open_files()
    cycle: list[object] = [Hold.on(path_of(name))]
    cycle.append(cycle)
    assert is_held(path_of(name))
    del cycle
    gc.collect()
    assert not is_held(path_of(name))
    assert open_files() == before


def test_a_released_hold_that_dies_closes_nobody_elses_file(made: str) -> None:
    hold = Hold.on(path_of(made))
    hold.release()
    other = os.open(os.devnull, os.O_RDONLY)
    del hold
    os.fstat(other)
    os.close(other)


# --- a reaper that comes between (H3) ----------------------------------------------------------------------------------------------------


def test_what_was_reaped_before_it_was_held_is_told_to_the_holder(made: str) -> None:
    """H3."""
    fd = os.open(path_of(made), os.O_RDWR)
    unlink_segment(made)
    with pytest.raises(FileNotFoundError, match="unlinked before it could be held"):
        Hold(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def _unlink_before_locking(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Has the reaper come exactly between opening and locking, once."""
    flock = fcntl.flock

    def unlink_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(path)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", unlink_first)


def test_attaching_to_what_is_reaped_in_between_says_connect_again(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H3."""
    before = open_files()
    _unlink_before_locking(monkeypatch, path_of(made))
    with pytest.raises(SegmentError, match="was reaped before it could be held: connect again"):
        Segment.attach(made, hold=True)
    assert open_files() == before


def test_a_fresh_object_that_the_reaper_meets_before_it_is_held_is_made_again(
    name: str, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H3."""
    _unlink_before_locking(monkeypatch, path_of(name))
    hold = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert is_held(path_of(name))
    Segment.attach(name, hold=True).close()
    hold.release()


# --- a reaper's lock in the way ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reapers_look(name: str, instance: str) -> Iterator[int]:
    """The open file through which somebody has the exclusive lock on a segment that nobody holds."""
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    fd = os.open(path_of(name), os.O_RDONLY)
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
    Hold.on(path_of(name)).release()
    assert len(naps) == 3


def test_a_lock_that_stands_for_longer_than_any_reapers_is_told_and_nothing_is_kept_open(
    name: str, reapers_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold_module, "LOCK_SECONDS", 0.0)
    before = open_files()
    with pytest.raises(BlockingIOError):
        Hold.on(path_of(name))
    assert open_files() == before


def test_attaching_under_a_foreign_exclusive_lock_is_told_and_nothing_is_kept_open(
    name: str, reapers_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold_module, "LOCK_SECONDS", 0.0)
    before = open_files()
    with pytest.raises(SegmentError, match=f"{name} is locked by another process.*try again"):
        Segment.attach(name, hold=True)
    assert open_files() == before
    assert not is_mapped(name)
    Segment.attach(name, hold=False).close()
    fcntl.flock(reapers_look, fcntl.LOCK_UN)
    Segment.attach(name, hold=True).close()


# --- watching a holder (H5) --------------------------------------------------------------------------------------------------------------


def test_a_hold_is_seen_to_end_with_its_process_and_not_with_the_files_name(name: str, instance: str) -> None:
    """H5."""
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    with holder(HOLDER, name) as process:
        watch = HoldWatch(path_of(name))
        os.unlink(path_of(name))
        os.kill(process.pid, signal.SIGSTOP)
        assert watch.held()
        process.kill()
        process.wait()
        assert not watch.held()


def test_what_nobody_holds_cannot_be_watched_and_watching_keeps_nothing_open(made: str) -> None:
    before = open_files()
    watch = HoldWatch(path_of(made))
    del watch
    assert open_files() == before
    unlink_segment(made)
    with pytest.raises(FileNotFoundError):
        HoldWatch(path_of(made))


def test_a_holder_knows_whether_the_name_is_still_that_of_its_file(name: str, instance: str) -> None:
    hold = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert hold.is_at(path_of(name))
    unlink_segment(name)
    assert not hold.is_at(path_of(name))
    other = make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1)
    assert not hold.is_at(path_of(name)), "another file has the name now"
    hold.release()
    other.release()


# --- where nothing can be locked (H4): what the broker does about it is in tests/broker ---------------------------------------------------------------------------------------------------


def _refusing(code: int) -> Callable[[int, int], None]:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_hold_on_a_system_without_locks_is_made_without_one(name: str, instance: str, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """H4: the process goes on, and it is not this hold that keeps the reaper away."""
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    with monkeypatch.context() as lockless:
        lockless.setattr(fcntl, "flock", _refusing(code))
        hold = Hold.on(path_of(name))
    assert not is_held(path_of(name))
    hold.release()


@pytest.mark.parametrize("code", [errno.EINTR, errno.EBADF, errno.EIO])
def test_a_lock_that_is_refused_for_another_reason_is_no_hold(name: str, instance: str, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """H4 is for systems that have no locks, and for no other trouble."""
    make_segment(name, SMALL, instance=instance, owner="o", owner_pid=1).release()
    before = open_files()
    monkeypatch.setattr(fcntl, "flock", _refusing(code))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        Hold.on(path_of(name))
    assert open_files() == before


def test_what_was_unlinked_is_told_also_where_nothing_can_be_locked(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H3, H4."""
    fd = os.open(path_of(made), os.O_RDWR)
    unlink_segment(made)
    monkeypatch.setattr(fcntl, "flock", _refusing(errno.ENOSYS))
    with pytest.raises(FileNotFoundError, match="unlinked before it could be held"):
        Hold(fd)
