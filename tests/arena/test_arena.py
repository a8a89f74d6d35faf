"""The arena: what can be placed and how it lies there, and what happens when there is no room. Invariant A4."""

from __future__ import annotations

import gc
import random
import re
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.arena.arena import Arena, Location, Room
from shmbroker.arena.ring import largest_request
from shmbroker.arena.spec import CODE_OF
from shmbroker.errors import ArenaFull, ArenaTooSmall, BadInput
from shmbroker.memory.segment import Segment
from tests.arena.blocks import GEOMETRY, UNIT, Cycle, blocks_in, fill, placed, property_settings
from tests.threads import STUCK_SECONDS, InThread

pytestmark = pytest.mark.usefixtures("flavour")


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# --- shapes, dtypes and the bytes themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODE_OF, ids=str)
@pytest.mark.parametrize("ndim", range(9))
def test_every_carried_dtype_and_rank_is_placed_contiguous_and_aliases_the_segment(
    segment: Segment, arena: Arena, dtype: torch.dtype, ndim: int
) -> None:
    shape = (2, 3, 1, 2, 1, 2, 1, 2)[:ndim]
    tensor, place = placed(arena, shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert place.offset % UNIT == 0
    assert GEOMETRY.arena_offset <= place.offset <= GEOMETRY.total_bytes - tensor.nbytes
    # 0 and 1 are the only bytes that every dtype, bool among them, reads as what they are.
    pattern = bytes(random.Random(ndim).choices((0, 1), k=tensor.nbytes))
    segment.map[place.offset : place.offset + tensor.nbytes] = pattern
    assert _bytes_of(tensor) == pattern
    tensor.view(-1).view(torch.uint8).fill_(1)
    assert segment.map[place.offset : place.offset + tensor.nbytes] == b"\1" * tensor.nbytes


@pytest.mark.parametrize("dtype", CODE_OF, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2), (0,) * 8])
def test_empty_tensors_are_placed_too_and_hold_a_block(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, place = placed(arena, shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.numel()) == (shape, dtype, 0)
    assert tensor.stride() == torch.empty(shape, dtype=dtype).stride()
    assert GEOMETRY.arena_offset <= place.offset < GEOMETRY.total_bytes
    assert blocks_in(arena) == 1
    del tensor
    assert blocks_in(arena) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_a_dtype_that_no_frame_carries_is_refused(arena: Arena, dtype: torch.dtype) -> None:
    for place in (lambda: arena.empty((1,), dtype), lambda: Room((1,), dtype), lambda: arena.copy_in(torch.empty(1, dtype=dtype))):
        with pytest.raises(BadInput, match=f"{dtype} cannot be handed over; carried are: float32, "):
            place()
    assert blocks_in(arena) == 0


def test_nine_dimensions_are_refused(arena: Arena) -> None:
    nine = (1,) * 9
    for place in (lambda: arena.empty(nine, torch.int8), lambda: Room(nine, torch.int8), lambda: arena.copy_in(torch.zeros(nine))):
        with pytest.raises(BadInput, match="9 dimensions cannot be handed over; at most 8"):
            place()


def test_a_negative_dimension_is_refused(arena: Arena) -> None:
    for place in (lambda: arena.empty((2, -1), torch.int8), lambda: Room((2, -1), torch.int8)):
        with pytest.raises(BadInput, match=r"shape \[2, -1\] cannot be used: dimensions are whole numbers"):
            place()
    assert blocks_in(arena) == 0


def test_one_room_is_placed_many_times_each_in_a_block_of_its_own(arena: Arena) -> None:
    room = Room((3, 5), torch.int32)
    assert (room.shape, room.dtype, room.count, room.nbytes) == ((3, 5), torch.int32, 15, UNIT)
    tensors = [arena.place(room)[0].fill_(number) for number in range(4)]
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
    assert (blocks_in(arena), arena.occupancy().held_bytes) == (4, 4 * UNIT)


def test_the_offset_that_is_told_leads_from_the_start_of_the_segment_to_the_first_element(arena: Arena) -> None:
    for dtype in CODE_OF:
        tensor, place = placed(arena, (7,), dtype)
        assert tensor.data_ptr() - arena.address == place.offset


def test_generations_in_an_arena_are_those_of_the_blocks_in_order_of_placing(arena: Arena) -> None:
    kept = [placed(arena, (1,), torch.int8) for _ in range(5)]
    assert [place.generation for _, place in kept] == [1, 2, 3, 4, 5]


def test_copying_in_makes_a_contiguous_equal_that_shares_nothing_with_the_original(arena: Arena) -> None:
    outside = torch.arange(24.0).view(4, 6).T[::2].requires_grad_()
    inside = arena.copy_in(outside)
    assert inside.is_contiguous()
    assert not inside.requires_grad
    assert torch.equal(inside, outside)
    assert arena.find(inside) is not None
    inside.zero_()
    assert outside.sum().item() != 0


# --- no room (A4) ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.0, 0.02])
def test_a_full_arena_says_after_the_timeout_what_was_asked_what_is_free_and_who_holds(arena: Arena, timeout: float) -> None:
    """A4."""
    held = fill(arena, 16)
    del held[1], held[3]
    with pytest.raises(ArenaFull) as caught:
        arena.empty((5000,), torch.uint8, timeout)
    told = re.fullmatch(
        r"(\d+) bytes asked, (\d+) free \(largest extent (\d+) of (\d+)\) and not enough released within ([\d.]+) s; "
        r"(\d+) blocks held, oldest: (.*); let go of tensors .* raise --arena .*",
        str(caught.value),
    )
    assert told is not None, str(caught.value)
    asked = largest_request(5000)
    figures = [float(figure) for figure in told.groups()[:6]]
    assert figures.pop(4) >= timeout, "the seconds that were really waited"
    assert figures == [asked, 8192, 4096, arena.nbytes, len(held)]
    first = GEOMETRY.arena_offset
    assert re.fullmatch(
        rf"4096 bytes at {first}, held [\d.]+ s; 4096 bytes at {first + 2 * 4096}, held .* s; 4096 bytes at {first + 3 * 4096}, held .* s",
        told[7],
    )
    assert not isinstance(caught.value, ArenaTooSmall)
    assert isinstance(caught.value, MemoryError)


def test_after_a_refusal_the_arena_works_on(arena: Arena) -> None:
    held = fill(arena, 16)
    with pytest.raises(ArenaFull):
        arena.empty((1,), torch.uint8, 0.0)
    held.pop()
    assert arena.empty((1,), torch.uint8, 0.0).numel() == 1


def test_a_block_larger_than_the_arena_is_refused_at_once_with_the_size_it_would_take(arena: Arena) -> None:
    """A4: waiting could not help, so it does not."""
    needed = largest_request(arena.nbytes + 1)
    with pytest.raises(ArenaTooSmall, match=rf"{needed} bytes .* arena of {arena.nbytes} bytes: .* at least {needed}; raise"):
        arena.empty((arena.nbytes + 1,), torch.uint8, timeout=1e6)
    assert arena.empty((arena.nbytes,), torch.uint8, 0.0).nbytes == arena.nbytes


@pytest.fixture
def collected_by(without_gc: None) -> Iterator[Callable[[int], threading.Event]]:
    """Events that are set when the thread of a given number runs the collector: the arena does so right before it waits."""
    events: dict[int, threading.Event] = {}

    def noticed(phase: str, info: dict[str, int]) -> None:
        event = events.get(threading.get_ident())
        if phase == "stop" and event is not None:
            event.set()

    def event_of(thread: int) -> threading.Event:
        return events.setdefault(thread, threading.Event())

    gc.callbacks.append(noticed)
    yield event_of
    gc.callbacks.remove(noticed)


def test_placing_waits_for_a_release_by_another_thread(arena: Arena, collected_by: Callable[[int], threading.Event]) -> None:
    """A4."""
    held = fill(arena, 32)
    known = threading.Event()
    numbers: list[int] = []

    def place() -> int:
        collected_by(threading.get_ident())
        numbers.append(threading.get_ident())
        known.set()
        return arena.empty((32 * UNIT,), torch.uint8, STUCK_SECONDS).fill_(9).numel()

    placing = InThread(place)
    assert known.wait(STUCK_SECONDS)
    assert collected_by(numbers[0]).wait(STUCK_SECONDS), "it never came to wait"
    held.pop(3)
    assert placing.join() == 32 * UNIT


def test_all_who_wait_get_room_when_one_block_that_is_large_enough_for_them_is_released(arena: Arena) -> None:
    """A4: the thread that takes the news leaves room over for the others, and they see it."""
    held = [arena.empty((arena.nbytes,), torch.uint8)]
    threads = [InThread(lambda: arena.empty((UNIT,), torch.uint8, STUCK_SECONDS)) for _ in range(6)]
    held.clear()
    tensors = [thread.join() for thread in threads]
    assert len({tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}) == 6


@pytest.mark.usefixtures("without_gc")
def test_garbage_in_a_reference_cycle_is_collected_before_a_full_arena_complains(arena: Arena) -> None:
    """A4: an exception's traceback, most often."""
    for tensor in fill(arena, 64):
        Cycle(tensor)
    del tensor
    assert arena.occupancy().free_bytes == 0
    assert arena.empty((arena.nbytes,), torch.uint8, STUCK_SECONDS).nbytes == arena.nbytes


@pytest.mark.usefixtures("without_gc")
def test_what_dies_in_that_collection_may_use_the_arena_itself(arena: Arena) -> None:
    """A4: the collector is called without the lock."""
    seen: list[int] = []
    garbage = Cycle(arena.empty((arena.nbytes,), torch.uint8))
    weakref.finalize(garbage, lambda: seen.append(arena.occupancy().blocks))
    del garbage
    InThread(lambda: arena.empty((UNIT,), torch.uint8, STUCK_SECONDS)).join()
    assert seen == [1]


def test_what_the_caller_has_waited_before_counts_in_what_a_full_arena_tells(arena: Arena) -> None:
    """A4: the seconds are those that were waited, whoever did it; and the wait is counted once, by who began it."""
    held = fill(arena, 16)
    with pytest.raises(ArenaFull, match=r"not enough released within 12\.50 s"):
        arena.place(Room((1,), torch.uint8), 0.0, waited=12.5)
    assert (arena.waits, arena.full, len(held)) == (0, 1, arena.nbytes // (16 * UNIT))


@property_settings
@given(st.permutations(range(8)), st.integers(0, 8))
def test_blocks_that_have_died_are_placed_again_from_the_first_on_whatever_order_they_died_in(
    segment: Segment, order: list[int], alive: int
) -> None:
    arena = Arena(segment)
    pairs: list[tuple[torch.Tensor, Location] | None] = [placed(arena, (16,), torch.float32) for _ in range(8)]
    offsets = [pair[1].offset for pair in pairs if pair is not None]
    for index in order[alive:]:
        pairs[index] = None
    again = [placed(arena, (16,), torch.float32) for _ in order[alive:]]
    assert [place.offset for _, place in again] == sorted(offsets[index] for index in order[alive:])
