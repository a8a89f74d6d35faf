"""What the tests of this room share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import posix_ipc
import pytest

from shmbroker.lane import python_ends, shm_lane, waiter
from shmbroker.memory import names
from shmbroker.memory.segment import Segment
from tests.conftest import SegmentOf
from tests.lane.bells import NEVER_SECONDS, BellNames
from tests.lane.empty_calls import GEOMETRY
from tests.lane.kinds_of_ends import KINDS, module_of
from tests.peers import broker

__all__ = ["broker"]


@pytest.fixture(params=["python", "compiled"])
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ends in Python and the compiled ones: what uses this fixture holds for both alike."""
    flavour = str(request.param)
    source = python_ends if flavour == "python" else pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    for name in ("SubmissionSender", "SubmissionReceiver", "CompletionSender", "CompletionReceiver"):
        monkeypatch.setattr(shm_lane, name, getattr(source, name))
    for name in ("spin", "before_sleep", "after_sleep"):
        monkeypatch.setattr(waiter, name, getattr(source, name))
    return flavour


@pytest.fixture
def bell_names(instance: str) -> Iterator[BellNames]:
    """Two semaphores, as the broker makes them."""
    made = (names.bell_name(instance, names.new_id()), names.bell_name(instance, names.new_id()))
    with contextlib.ExitStack() as undo:
        for name in made:
            posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=0).close()
            undo.callback(posix_ipc.unlink_semaphore, name)
        yield made


@pytest.fixture
def segment(segment_of: SegmentOf) -> Segment:
    return segment_of(GEOMETRY)


@pytest.fixture
def words() -> memoryview:
    """Words of private memory, for waiters that no peer looks at."""
    return memoryview(bytearray(64)).cast("Q")


@pytest.fixture
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost ring is not healed; forked children inherit it."""
    monkeypatch.setattr(waiter, "RECHECK_SECONDS", NEVER_SECONDS)


@pytest.fixture(params=KINDS)
def ends(request: pytest.FixtureRequest) -> ModuleType:
    """The module of each kind."""
    return module_of(str(request.param))


@pytest.fixture
def compiled_ends() -> ModuleType:
    return module_of("compiled")
