"""The ring allocator against a model that knows held blocks only, and by example."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmbroker.arena.ring import Extent, RingAllocator, largest_request
from shmbroker.memory.layout import ALIGNMENT

OFFSET = 3 * ALIGNMENT
"""Where the rings of the examples begin: not at 0, so that an offset taken for a size shows."""

UNITS = 16
"""Length of the rings of the examples, in units of the alignment."""


def _ring(units: int = UNITS) -> RingAllocator:
    return RingAllocator(OFFSET, units * ALIGNMENT)


def _place(ring: RingAllocator, units: int = 1) -> Extent:
    block = ring.place(units * ALIGNMENT)
    assert block is not None
    return block


class RingAgainstModel(RuleBasedStateMachine):
    """The model is the list of held blocks in order of placing; what is free follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = _ring()
        self.held: list[Extent] = []
        self.remembered: list[tuple[int, int, int]] = []
        self.placed = 0
        self.last_generation = 0

    @initialize(units=st.integers(1, 64), offset=st.integers(0, 1 << 20))
    def begin(self, units: int, offset: int) -> None:
        self.ring = RingAllocator(offset * ALIGNMENT, units * ALIGNMENT)

    def gaps(self) -> list[tuple[int, int]]:
        """Maximal runs of bytes that no block of the model covers, as offset and length."""
        runs = []
        at = self.ring.offset
        for offset, nbytes, _ in sorted(self.remembered):
            if offset > at:
                runs.append((at, offset - at))
            at = offset + nbytes
        end = self.ring.offset + self.ring.nbytes
        if end > at:
            runs.append((at, end - at))
        return runs

    def place(self, nbytes: int) -> None:
        need = largest_request(nbytes)
        gaps = self.gaps()
        cursor = self.ring.cursor
        round_the_ring = [gap for gap in gaps if gap[0] >= cursor] + [gap for gap in gaps if gap[0] < cursor]
        expected = next((offset for offset, length in round_the_ring if length >= need), None)
        block = self.ring.place(nbytes)
        if block is None:
            assert expected is None, f"R5: refused {need} bytes with {gaps} free"
            return
        assert block.held
        assert block.offset == expected, "R4: the first free extent round the ring that is large enough"
        assert block.nbytes == need
        assert block.generation > self.last_generation, "R6"
        assert 0 < block.generation < 1 << 32, "R6"
        self.last_generation = block.generation
        self.placed += 1
        self.held.append(block)
        self.remembered.append((block.offset, block.nbytes, block.generation))

    @rule(nbytes=st.integers(0, 6 * ALIGNMENT))
    def place_small(self, nbytes: int) -> None:
        self.place(nbytes)

    @rule(share=st.floats(0.1, 1.2))
    def place_large(self, share: float) -> None:
        self.place(int(self.ring.nbytes * share))

    @rule(pick=st.integers(0, 1 << 16))
    def place_what_just_fits_a_gap(self, pick: int) -> None:
        gaps = self.gaps()
        if gaps:
            self.place(gaps[pick % len(gaps)][1])

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 1 << 16))
    def release_any(self, pick: int) -> None:
        index = pick % len(self.held)
        del self.remembered[index]
        self.ring.release(self.held.pop(index))

    @precondition(lambda self: self.held)
    @rule()
    def release_the_oldest(self) -> None:
        self.release_any(0)

    @precondition(lambda self: self.held)
    @rule()
    def release_the_newest(self) -> None:
        self.release_any(len(self.held) - 1)

    @invariant()
    def blocks_lie_apart_inside_and_aligned(self) -> None:
        """R1; and a held block never moves (R4)."""
        assert [(block.offset, block.nbytes, block.generation) for block in self.held] == self.remembered
        at = self.ring.offset
        for offset, nbytes, _ in sorted(self.remembered):
            assert offset >= at
            assert offset % ALIGNMENT == nbytes % ALIGNMENT == 0
            at = offset + nbytes
        assert at <= self.ring.offset + self.ring.nbytes

    @invariant()
    def extents_cover_the_ring_exactly_and_free_ones_are_no_neighbours(self) -> None:
        """R2."""
        at = self.ring.offset
        held_before = True
        free = []
        for extent in self.ring.extents():
            assert extent.offset == at
            assert extent.nbytes > 0
            assert extent.held or held_before, "two neighbouring free extents"
            held_before = extent.held
            if not extent.held:
                free.append((extent.offset, extent.nbytes))
            at += extent.nbytes
        assert at == self.ring.offset + self.ring.nbytes
        assert free == self.gaps()

    @invariant()
    def links_lead_back_the_way_they_came(self) -> None:
        extents = list(self.ring.extents())
        assert [extent.before for extent in extents] == [None, *extents[:-1]]

    @invariant()
    def cursor_points_at_an_extent(self) -> None:
        assert self.ring.cursor in {extent.offset for extent in self.ring.extents()}

    @invariant()
    def figures_are_those_of_the_model(self) -> None:
        figures = self.ring.occupancy()
        held_bytes = sum(nbytes for _, nbytes, _ in self.remembered)
        assert figures.total_bytes == self.ring.nbytes
        assert figures.held_bytes == self.ring.held_bytes == held_bytes
        assert figures.free_bytes == self.ring.nbytes - held_bytes
        assert figures.largest_free_bytes == max((length for _, length in self.gaps()), default=0)
        assert figures.blocks == self.ring.block_count == len(self.held)
        assert figures.placed == self.placed


class TestRingAgainstModel(RingAgainstModel.TestCase):
    """R1 to R6, by random placing and releasing."""

    settings = settings(deadline=None, max_examples=120, stateful_step_count=40)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5 * ALIGNMENT), min_size=50, max_size=200), st.integers(1, 3))
def test_used_first_in_first_out_no_place_is_more_than_two_extents_from_the_cursor(sizes: list[int], in_flight: int) -> None:
    """R3: what must be walked does not grow with the number of blocks."""
    ring = _ring(64)
    held: deque[Extent] = deque()
    for nbytes in sizes:
        if len(held) == in_flight * 4:
            ring.release(held.popleft())
        offsets = [extent.offset for extent in ring.extents()]
        start = offsets.index(ring.cursor)
        block = ring.place(nbytes)
        while block is None:
            ring.release(held.popleft())
            offsets = [extent.offset for extent in ring.extents()]
            start = offsets.index(ring.cursor)
            block = ring.place(nbytes)
        assert (offsets.index(block.offset) - start) % len(offsets) <= 2
        held.append(block)


def test_first_in_first_out_use_sweeps_round_the_ring_and_wraps() -> None:
    """R3."""
    ring = _ring()
    held = deque(_place(ring) for _ in range(4))
    offsets = [block.offset for block in held]
    for _ in range(5 * UNITS):
        ring.release(held.popleft())
        held.append(_place(ring))
        offsets.append(held[-1].offset)
    assert offsets == [OFFSET + (i % UNITS) * ALIGNMENT for i in range(len(offsets))]


def test_one_block_that_is_held_for_long_never_blocks_the_ring() -> None:
    """R4: it is stepped over in every round, and stays where it is."""
    ring = _ring()
    _place(ring, 5)
    kept = _place(ring)
    held: deque[Extent] = deque()
    seen = set()
    for _ in range(20 * UNITS):
        if len(held) == 3:
            ring.release(held.popleft())
        held.append(_place(ring, 2))
        seen.add(held[-1].offset)
    assert (kept.offset, kept.held, kept.generation) == (OFFSET + 5 * ALIGNMENT, True, 2)
    assert max(seen) > kept.offset
    assert kept.offset not in seen


def test_stepping_over_held_blocks_and_gaps_that_are_too_small_finds_the_one_that_fits() -> None:
    """R4, R5."""
    ring = _ring()
    blocks = [_place(ring, units) for units in (1, 3, 2, 1, 9)]
    ring.release(blocks[0])
    ring.release(blocks[2])
    ring.release(blocks[1])
    assert ring.place(7 * ALIGNMENT) is None
    assert _place(ring, 6).offset == OFFSET


def test_a_request_that_no_free_extent_can_hold_fails_though_enough_is_free_in_all() -> None:
    """R5."""
    ring = _ring(4)
    blocks = [_place(ring) for _ in range(4)]
    ring.release(blocks[0])
    ring.release(blocks[2])
    assert ring.occupancy().free_bytes == 2 * ALIGNMENT
    assert ring.place(2 * ALIGNMENT) is None
    assert ring.occupancy().placed == 4, "a refused request uses up no generation"


def test_exact_fit_leaves_no_empty_extent_behind() -> None:
    ring = _ring()
    block = _place(ring, UNITS)
    assert list(ring.extents()) == [block]
    assert ring.place(1) is None
    ring.release(block)
    assert _place(ring, UNITS).offset == OFFSET


def test_no_bytes_at_all_take_one_unit() -> None:
    ring = _ring()
    block = ring.place(0)
    assert block is not None
    assert block.nbytes == largest_request(0) == ALIGNMENT


@pytest.mark.parametrize("nbytes", [1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT + 3])
def test_a_ring_of_the_largest_request_holds_exactly_that_request(nbytes: int) -> None:
    assert RingAllocator(0, largest_request(nbytes)).place(nbytes) is not None
    if largest_request(nbytes) > ALIGNMENT:
        assert RingAllocator(0, largest_request(nbytes) - ALIGNMENT).place(nbytes) is None


def test_releasing_twice_raises_and_changes_nothing() -> None:
    ring = _ring()
    block = _place(ring)
    _place(ring)
    ring.release(block)
    before = ring.occupancy()
    with pytest.raises(ValueError, match=f"the block at {block.offset} was released twice"):
        ring.release(block)
    assert ring.occupancy() == before


def test_generations_count_the_blocks_from_one_on() -> None:
    """R6: 0 is never given, and a place that is used again has a new generation."""
    ring = _ring()
    generations = []
    for _ in range(100):
        block = _place(ring, UNITS)
        generations.append(block.generation)
        ring.release(block)
    assert generations == list(range(1, 101))


@pytest.mark.parametrize("before", [(1 << 32) - 9, 2 * ((1 << 32) - 1) - 7, (1 << 64) - 5])
def test_generations_stay_distinct_across_the_wrap_at_32_bits(before: int) -> None:
    """R6: after the largest comes 1 again; 0 is left out, and no two blocks that follow each other closely have the same."""
    ring = _ring()
    ring.placed = before  # as if so many blocks had been placed already
    blocks = [_place(ring) for _ in range(UNITS)]
    generations = [block.generation for block in blocks]
    assert len(set(generations)) == UNITS
    assert all(1 <= generation < 1 << 32 for generation in generations)
    steps = itertools.pairwise(generations)
    assert all(later == earlier + 1 or (earlier, later) == ((1 << 32) - 1, 1) for earlier, later in steps)
    assert ring.occupancy().placed == before + UNITS


def test_the_largest_generation_is_given_too() -> None:
    """R6."""
    ring = _ring()
    ring.placed = (1 << 32) - 2
    assert [_place(ring).generation for _ in range(3)] == [(1 << 32) - 1, 1, 2]


def test_oldest_names_the_blocks_that_were_placed_longest_ago_first() -> None:
    ring = _ring()
    blocks = [_place(ring) for _ in range(6)]
    for block in (blocks[0], blocks[2]):
        ring.release(block)
    again = _place(ring)
    assert ring.oldest(3) == [blocks[1], blocks[3], blocks[4]]
    assert ring.oldest(99)[-1] is again
    assert ring.oldest(0) == []


def test_occupancy_of_an_untouched_ring_is_all_free() -> None:
    figures = _ring().occupancy()
    assert (figures.total_bytes, figures.free_bytes, figures.largest_free_bytes) == (UNITS * ALIGNMENT,) * 3
    assert (figures.held_bytes, figures.blocks, figures.placed) == (0, 0, 0)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, -ALIGNMENT), (0, ALIGNMENT + 1), (1, ALIGNMENT)])
def test_a_ring_must_begin_and_end_aligned(offset: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of {ALIGNMENT}, not {offset} and {nbytes}"):
        RingAllocator(offset, nbytes)


def test_a_block_that_is_placed_again_keeps_its_place_and_gets_a_new_generation() -> None:
    ring = RingAllocator(0, 1024)
    first, second = ring.place(256), ring.place(256)
    assert first is not None
    assert second is not None
    before = (first.offset, ring.held_bytes, ring.block_count, ring.cursor)
    ring.place_again(first)
    assert (first.offset, ring.held_bytes, ring.block_count, ring.cursor) == before
    assert first.generation == second.generation + 1
    assert ring.occupancy().placed == 3
    ring.release(first)
    with pytest.raises(ValueError, match="released before"):
        ring.place_again(first)
