"""An arena that is used by a finaliser, in the midst of its own work or another thread's."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable

import pytest
import torch

from shmbroker.arena.arena import Arena, Room
from shmbroker.arena.ring import Extent, RingAllocator
from shmbroker.errors import ArenaBusy, ArenaFull
from shmbroker.memory.segment import Segment
from tests.arena.blocks import UNIT, Cycle, blocks_in
from tests.conftest import InChild
from tests.threads import STUCK_SECONDS, InThread

pytestmark = pytest.mark.usefixtures("flavour")


# All of these in a child: where the arena waits for itself, the child is killed, and the rest of the tests go on.
USES: dict[str, Callable[[Arena, torch.Tensor], object]] = {
    "placing": lambda arena, tensor: arena.empty((UNIT,), torch.uint8, 0.0),
    "placing, willing to wait": lambda arena, tensor: arena.empty((UNIT,), torch.uint8, STUCK_SECONDS),
    "placing more than there is room for": lambda arena, tensor: arena.empty((arena.nbytes,), torch.uint8, 0.0),
    "copying in": lambda arena, tensor: arena.copy_in(torch.zeros(3)),
    "searching": lambda arena, tensor: arena.find(torch.from_numpy(tensor.numpy()[1:])),
    "counting": lambda arena, tensor: arena.occupancy(),
}


def _use_in_the_midst_of_placing(arena: Arena, use: Callable[[Arena, torch.Tensor], object]) -> None:
    living = [arena.empty((8,), torch.int64).fill_(1)]
    place = RingAllocator.place
    refused: list[str] = []

    def place_and_collect(ring: RingAllocator, nbytes: int) -> Extent | None:
        """Stands for an allocation at which the collector meets an object whose finaliser uses the arena."""
        RingAllocator.place = place
        try:
            use(arena, living[0])
        except ArenaBusy as error:
            refused.append(str(error))
        return place(ring, nbytes)

    RingAllocator.place = place_and_collect
    living.append(arena.empty((8,), torch.int64).fill_(2))
    assert len(refused) == 1
    assert "finaliser" in refused[0]
    assert [tensor.tolist() for tensor in living] == [[1] * 8, [2] * 8], "the placing that was interrupted is none the worse"
    assert blocks_in(arena) == 2
    use(arena, living[0])  # afterwards it may
    living.clear()
    assert blocks_in(arena) == 0


@pytest.mark.parametrize("use", [name for name in USES if "more than" not in name])
def test_a_finaliser_that_uses_the_arena_in_the_midst_of_placing_is_refused_and_the_placing_goes_on(
    segment: Segment, in_child: InChild, use: str
) -> None:
    in_child(lambda: _use_in_the_midst_of_placing(Arena(segment), USES[use]))


class UsesTheArena(Cycle):
    """Garbage whose finaliser uses the arena, and notes what came of it."""

    def __init__(self, arena: Arena, use: Callable[[Arena, torch.Tensor], object], outcomes: dict[str, int]) -> None:
        super().__init__(arena.empty((8,), torch.int64))
        self.arena = arena
        self.use = use
        self.outcomes = outcomes

    def __del__(self) -> None:
        try:
            self.use(self.arena, self.tensor)
            came = "works"
        except ArenaBusy:
            came = "busy"
        except ArenaFull:
            came = "full"
        self.outcomes[came] = self.outcomes.get(came, 0) + 1


def _place_while_finalisers_use_the_arena_at_every_allocation(arena: Arena) -> None:
    outcomes: dict[str, int] = {}
    uses = [use for name, use in USES.items() if "willing to wait" not in name]
    rooms = [Room((5, 7), torch.float32), Room((5, 7), torch.bfloat16), Room((arena.nbytes,), torch.uint8)]
    tried = list(itertools.product(range(20), uses, rooms))
    gc.collect()
    gc.freeze()
    for allocations, use, room in tried:
        gc.disable()
        gc.collect()
        UsesTheArena(arena, use, outcomes)
        gc.set_threshold(gc.get_count()[0] + allocations, 1, 1)
        gc.enable()
        try:
            kept = arena.place(room, 0.0)[0].fill_(1)
        except ArenaFull:
            assert room is rooms[2], "only that one has no room"
        else:
            assert kept.eq(1).all()
        kept = None
        inert = [[] for _ in range(70)]  # type: ignore[var-annotated]
        assert len(inert) == 70
    gc.collect()
    assert blocks_in(arena) == 0
    assert outcomes.get("busy", 0) > 0, "none came in the midst of placing: this tests nothing"
    assert outcomes.get("works", 0) > 0
    assert sum(outcomes.values()) == len(tried)


def test_a_finaliser_that_uses_the_arena_at_any_allocation_is_served_or_refused_and_never_waits_for_itself(
    segment: Segment, in_child: InChild
) -> None:
    """The collector is made to run after each possible number of allocations, and inside the lock as well."""
    in_child(lambda: _place_while_finalisers_use_the_arena_at_every_allocation(Arena(segment)))


class TellsOfWaiting:
    """A lock that says so when somebody has to wait for it."""

    def __init__(self, lock: threading.RLock, waiting: threading.Event) -> None:  # type: ignore[valid-type]
        self._lock = lock
        self._waiting = waiting
        self.release = lock.release  # type: ignore[attr-defined]

    def acquire(self) -> None:
        if not self._lock.acquire(blocking=False):  # type: ignore[attr-defined]
            self._waiting.set()
            self._lock.acquire()  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def _arena_that_tells_of_waiting(segment: Segment) -> tuple[Arena, threading.Event]:
    """And the event that is set when a thread has to wait for the arena's lock."""
    waiting = threading.Event()
    make = threading.RLock
    threading.RLock = lambda: TellsOfWaiting(make(), waiting)  # type: ignore[misc, assignment]
    try:
        return Arena(segment), waiting
    finally:
        threading.RLock = make  # type: ignore[misc]


def _use_while_another_thread_places(segment: Segment, use: Callable[[Arena, torch.Tensor], object]) -> None:
    arena, waiting = _arena_that_tells_of_waiting(segment)
    known = arena.empty((8,), torch.int64)
    place = RingAllocator.place
    inside = threading.Event()

    def place_slowly(ring: RingAllocator, nbytes: int) -> Extent | None:
        RingAllocator.place = place
        inside.set()
        assert waiting.wait(STUCK_SECONDS)
        return place(ring, nbytes)

    RingAllocator.place = place_slowly
    slow = InThread(lambda: arena.empty((8,), torch.int64))
    assert inside.wait(STUCK_SECONDS)
    other = InThread(lambda: use(arena, known))
    slow.join()
    other.join()


@pytest.mark.parametrize("use", [name for name in USES if "more than" not in name])
def test_who_uses_the_arena_while_another_thread_places_waits_for_that_one_and_is_served(
    segment: Segment, in_child: InChild, use: str
) -> None:
    in_child(lambda: _use_while_another_thread_places(segment, USES[use]))
