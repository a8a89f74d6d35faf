"""What the tests of this room share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from shmbroker.arena.arena import Arena
from shmbroker.memory import compiled
from shmbroker.memory.segment import Segment
from tests.arena.blocks import GEOMETRY
from tests.conftest import SegmentOf


@pytest.fixture(params=["python", "compiled"])
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The leases in Python and the compiled ones: what uses this fixture holds for both alike."""
    flavour = str(request.param)
    if flavour == "compiled":
        pytest.importorskip("shmbroker.arena._leases", reason="built without a C compiler")
    monkeypatch.setattr(compiled, "WANTED", flavour == "compiled")
    return flavour


@pytest.fixture
def segment(segment_of: SegmentOf) -> Segment:
    return segment_of(GEOMETRY)


@pytest.fixture
def arena(segment: Segment) -> Arena:
    return Arena(segment)


@pytest.fixture
def eager_gc() -> Iterator[None]:
    """The collector runs after every few allocations, so also in the middle of placing."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what lives already is no garbage: looking through all of torch each time would take most of the test
    gc.set_threshold(7, 2, 2)
    yield
    gc.enable()
    gc.set_threshold(*before)
    gc.unfreeze()
