"""What all tests share: throw-away instances, segments and child processes, and the check that nothing of them is left behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment, make_segment, unlink_segment

os.environ.pop("COLUMNS", None)
"""Set by pytest-xdist; programs of tests print as where nobody has set it."""

for _number, _action in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # under nohup, or in the background of a script: programs of tests would inherit it
        signal.signal(_number, _action)

SegmentOf = Callable[[Geometry], Segment]
StartChild = Callable[..., ForkProcess]
InChild = Callable[[Callable[[], None]], None]

INSTANCE_PREFIX = f"t{os.getpid()}-"
"""Of every instance that this run uses: tells its objects in shared memory from those of another run on the same machine."""

END_SECONDS = 60.0
"""How long a child that was told to end, or killed, may take to be gone."""

CHILD_SECONDS = 300.0
"""In which what is tried in a child must be done: many times what any of it takes."""

LONGEST = ("tests/systemd/", "tests/tee_worker/", "tests/benchmarks/", "tests/docs/test_tutorial.py", "tests/hostile/")
"""Files that take minutes. They come first: of those that run side by side, none is begun when all others are at their end."""

_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else in its order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_shared_memory() -> Iterator[None]:
    yield
    ours = (f"shmbroker.{INSTANCE_PREFIX}", f"sem.shmbroker.{INSTANCE_PREFIX}")
    left = sorted(file for file in os.listdir(names.SHM_DIR) if file.startswith(ours))
    for file in left:
        os.unlink(f"{names.SHM_DIR}/{file}")
    assert not left, f"left behind in {names.SHM_DIR}: {left}"


@pytest.fixture
def instance() -> str:
    """The name of an instance that nobody else uses."""
    return f"{INSTANCE_PREFIX}{next(_numbers)}"


@pytest.fixture
def without_gc() -> Iterator[None]:
    """What dies, dies with its last reference: the collector runs only when a test, or what it tests, calls it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="shmbroker-") as folder:
        yield Path(folder)


@pytest.fixture
def segment_of(instance: str) -> Iterator[SegmentOf]:
    """Makes segments of a given geometry, held until the test ends, then closed and unlinked."""
    with contextlib.ExitStack() as undo:

        def make(geometry: Geometry) -> Segment:
            name = names.segment_name(instance, names.new_id())
            hold = make_segment(name, geometry, instance=instance, owner="test", owner_pid=os.getpid())
            undo.callback(hold.release)
            undo.callback(unlink_segment, name)
            segment = Segment.attach(name, hold=False)
            undo.callback(segment.close)
            return segment

        yield make


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    """Starts ``target(*args)`` in a forked child; whatever still runs when the test ends is killed."""
    fork = multiprocessing.get_context("fork")
    children: list[ForkProcess] = []

    def alone(target: Callable[..., None], *args: object) -> None:
        # A forked child has the parent's pool of compute threads by name only, and would wait for it for ever.
        torch.set_num_threads(1)
        target(*args)

    def start(target: Callable[..., None], *args: object) -> ForkProcess:
        child = fork.Process(target=alone, args=(target, *args))
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        if child.is_alive():
            child.kill()
        child.join(END_SECONDS)
        child.close()


@pytest.fixture
def in_child(start_child: StartChild) -> InChild:
    """Runs ``work()`` in a forked child and fails unless it returns: what gets stuck or crashes there takes no other test with it."""

    def run(work: Callable[[], None]) -> None:
        child = start_child(work)
        child.join(CHILD_SECONDS)
        assert not child.is_alive(), "stuck"
        assert child.exitcode == 0, f"exit status {child.exitcode} (negative: of a signal); what it said is in the captured stderr"

    return run
