"""Finding a tensor in the arena by its address, through views of any kind. Invariant A3."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.arena.arena import Arena, Location, Room
from shmbroker.arena.ring import LARGE_BYTES, Extent
from shmbroker.errors import ArenaFull
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment
from tests.arena.blocks import GEOMETRY, UNIT, placed, property_settings
from tests.conftest import SegmentOf

pytestmark = pytest.mark.usefixtures("flavour")


def test_a_tensor_is_found_where_it_was_placed(arena: Arena) -> None:
    """A3."""
    for _ in range(3):
        tensor, place = placed(arena, (4, 8), torch.float32)
        assert arena.find(tensor) == place


@pytest.mark.parametrize(
    ("view", "elements"),
    [
        (lambda tensor: tensor[1:], 8),
        (lambda tensor: tensor[1:, 2:], 10),
        (lambda tensor: tensor.T[3:, ::2], 3),
        (lambda tensor: tensor[::2][1:][0, 5:], 21),
        (lambda tensor: tensor.view(-1)[7:].as_strided((2, 2), (1, 3), 9), 9),
        (lambda tensor: tensor[3, 7].expand(4), 31),
        (lambda tensor: tensor[1:].view(torch.uint8), 8),
        (lambda tensor: torch.from_numpy(tensor.numpy()[1:]), 8),
        (lambda tensor: torch.from_numpy(tensor.numpy()[2:, 3:])[1:, 1:], 28),
        (lambda tensor: torch.frombuffer(memoryview(tensor.numpy()).cast("B")[8:], dtype=torch.float32), 2),
        (lambda tensor: torch.from_dlpack(tensor)[2:], 16),
    ],
)
def test_views_of_any_kind_are_found_by_their_first_element(
    arena: Arena, view: Callable[[torch.Tensor], torch.Tensor], elements: int
) -> None:
    """A3."""
    neighbours = [arena.empty((3,), torch.float32)]
    tensor, place = placed(arena, (4, 8), torch.float32)
    neighbours.append(arena.empty((3,), torch.float32))
    found = arena.find(view(tensor))
    assert found is not None
    assert found.offset == place.offset + elements * 4
    assert found.generation == place.generation


def test_tensors_outside_are_not_found(segment: Segment, arena: Arena, segment_of: SegmentOf) -> None:
    """A3: not those of another arena, of the segment's other parts, or of a part of the arena in which no block lies."""
    inside, place = placed(arena, (UNIT,), torch.uint8)
    outside = [
        torch.zeros(4),
        torch.zeros(0),
        torch.empty(4, device="meta"),
        torch.eye(3).to_sparse(),
        Arena(segment_of(GEOMETRY)).empty((4,), torch.float32),
        torch.frombuffer(memoryview(segment.map)[: layout.PAGE], dtype=torch.uint8),
        torch.frombuffer(memoryview(segment.map)[GEOMETRY.arena_offset - 1 :], dtype=torch.uint8),
        torch.frombuffer(memoryview(segment.map)[place.offset + UNIT :], dtype=torch.uint8),
    ]
    assert [arena.find(tensor) for tensor in outside] == [None] * len(outside)
    assert arena.find(inside) == place


def test_nothing_is_found_in_an_arena_without_blocks(segment: Segment, arena: Arena) -> None:
    tensor = torch.frombuffer(memoryview(segment.map)[GEOMETRY.arena_offset :], dtype=torch.uint8)
    assert arena.find(tensor) is None


@property_settings
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    cuts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 3), st.booleans()), max_size=5),
    before=st.integers(0, 5),
)
def test_any_chain_of_views_is_found_in_its_block(
    segment: Segment, shape: list[int], cuts: list[tuple[int, int, int, bool]], before: int
) -> None:
    """A3."""
    arena = Arena(segment)
    neighbours = [arena.empty((100 * i,), torch.uint8) for i in range(before)]
    view, place = placed(arena, tuple(shape), torch.float32)
    base = view.data_ptr()
    for axis, start, step, through_numpy in cuts:
        axis %= view.dim()
        start = min(start, view.shape[axis] - 1)
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
        if through_numpy:
            view = torch.from_numpy(view.numpy())
    found = arena.find(view)
    assert found is not None
    assert found is not None
    assert found[:2] == (place.offset + view.data_ptr() - base, place.generation)
    assert len(neighbours) == before


BIG = Geometry(arena_bytes=4 << 20, channel_count=1, depth=1)


def test_a_slice_of_an_array_is_found_by_as_many_looks_whatever_else_is_held(segment_of: SegmentOf) -> None:
    """A3. Counted, since no time is to be asserted: looks into the arena's books, with few blocks held and with thousands."""

    class Counted(dict[int, Extent]):
        looks = 0

        def get(self, key: int, default: Any = None) -> Any:
            self.looks += 1
            return super().get(key, default)

        def __iter__(self) -> Iterator[int]:
            self.looks += len(self)
            return super().__iter__()

    arena = Arena(segment_of(BIG))
    tensor, place = placed(arena, (1 << 20,), torch.uint8)
    small, small_place = placed(arena, (LARGE_BYTES - UNIT,), torch.uint8)
    slices = [torch.from_numpy(whole.numpy()[at:]) for whole, at in ((tensor, 1), (tensor, (1 << 20) - 1), (small, 1), (small, 60_000))]

    def looks() -> int:
        arena.blocks = counted = Counted(arena.blocks)
        found = [arena.find(one) for one in slices]
        assert [one and one.generation for one in found] == [place.generation] * 2 + [small_place.generation] * 2
        assert [one and one.offset for one in found[:3]] == [place.offset + 1, place.offset + (1 << 20) - 1, small_place.offset + 1]
        return counted.looks

    alone = looks()
    others = [arena.empty((1,), torch.uint8) for _ in range(8000)]
    assert looks() == alone < 300
    assert len(others) == 8000


@pytest.fixture
def big_segment(segment_of: SegmentOf) -> Segment:
    return segment_of(BIG)


@property_settings
@given(steps=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 700), st.booleans()), max_size=40), data=st.data())
def test_large_and_small_blocks_are_found_after_any_placing_and_letting_go(
    big_segment: Segment, steps: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    """A3, R7."""
    arena = Arena(big_segment)
    held: list[tuple[torch.Tensor, Location]] = []
    for victim, units, let_go in steps:
        if let_go and held:
            del held[victim % len(held)]
        with contextlib.suppress(ArenaFull):
            tensor, block = arena.place(Room((units * UNIT,), torch.uint8), 0.0)
            held.append((tensor, Location(block.offset, block.generation, block)))
    for tensor, place in held:
        at = data.draw(st.integers(0, tensor.numel() - 1))
        found = arena.find(torch.from_numpy(tensor.numpy()[at:]))
        assert found is not None
        assert found[:2] == (place.offset + at, place.generation)
