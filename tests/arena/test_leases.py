"""Leases: a block is released when the last view of it dies, at whatever moment that is, and never before. Invariants A1 and A2."""

from __future__ import annotations

import gc
import itertools
import os
import random
import traceback
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.arena.arena import Arena, Room
from shmbroker.arena.leases import leases_over
from shmbroker.arena.python_leases import PythonLeases
from shmbroker.arena.ring import RingAllocator
from shmbroker.arena.room import room_for
from shmbroker.arena.spec import CODE_OF, NUMPY_OF
from shmbroker.errors import ArenaFull
from shmbroker.memory import names
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from tests.arena.blocks import GEOMETRY, UNIT, Cycle, blocks_in, placed, property_settings
from tests.conftest import InChild
from tests.shared_memory import is_mapped
from tests.threads import STUCK_SECONDS, InThread

pytestmark = pytest.mark.usefixtures("flavour")


# --- who keeps a block (A1) --------------------------------------------------------------------------------------------------------------


def test_block_is_reclaimed_only_after_the_last_view_dies(arena: Arena) -> None:
    """A1, through views of views."""
    tensor = arena.empty((4, 8), torch.float32)
    view = tensor[1:]
    view_of_view = view.T[2:4]
    del tensor
    assert blocks_in(arena) == 1
    del view
    assert blocks_in(arena) == 1
    del view_of_view
    assert blocks_in(arena) == 0


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "reshaped": lambda tensor: tensor.view(-1)[3:],
    "another dtype": lambda tensor: tensor.view(torch.uint8),
    "detached": lambda tensor: tensor.detach(),
    "expanded": lambda tensor: tensor[0, :1].expand(5),
    "one element": lambda tensor: tensor[2, 2],
    "storage": lambda tensor: tensor.untyped_storage(),
    "autograd view": lambda tensor: tensor.requires_grad_().view(-1),
    "numpy": lambda tensor: tensor.numpy(),
    "numpy slice": lambda tensor: tensor.numpy()[1:, ::2],
    "tensor of a numpy slice": lambda tensor: torch.from_numpy(tensor.numpy()[1:]),
    "memoryview": lambda tensor: memoryview(tensor.numpy()),
    "memoryview slice": lambda tensor: memoryview(tensor.numpy())[1:][1:],
    "memoryview cast": lambda tensor: memoryview(tensor.numpy()).cast("B"),
    "array of a memoryview": lambda tensor: np.frombuffer(memoryview(tensor.numpy()).cast("B"), dtype=np.uint8),
    "dlpack": lambda tensor: torch.from_dlpack(tensor),
    "numpy dlpack": lambda tensor: np.from_dlpack(tensor),
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_whatever_views_a_block_keeps_it_and_lets_it_go(arena: Arena, hold: Callable[[torch.Tensor], object], dtype: torch.dtype) -> None:
    """A1, also for a dtype that NumPy lacks: its tensors are made another way (and viewed here as one that NumPy has)."""
    assert (torch.float32 in NUMPY_OF, torch.bfloat16 in NUMPY_OF) == (True, False)
    holder: list[object] = [hold(arena.empty((4, 32 // dtype.itemsize), dtype).view(torch.float32))]
    assert blocks_in(arena) == 1
    holder.clear()
    assert blocks_in(arena) == 0


def test_a_graph_that_saved_a_tensor_for_backward_keeps_its_block(arena: Arena) -> None:
    """A1."""
    weight = torch.ones(4, requires_grad=True)
    tensor = arena.empty((4,), torch.float32).copy_(torch.arange(4.0))
    loss = (weight * tensor).sum()
    del tensor
    assert blocks_in(arena) == 1
    loss.backward()
    del loss
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert blocks_in(arena) == 0


def test_a_copy_keeps_nothing(arena: Arena) -> None:
    copies = [arena.empty((4,), torch.float32).zero_().clone(), arena.empty((4,), torch.float32).zero_().numpy().copy()]
    assert len(copies) == 2
    assert blocks_in(arena) == 0


def test_a_block_that_died_is_placed_again_with_a_new_generation(arena: Arena) -> None:
    tensor, first = placed(arena, (arena.nbytes,), torch.uint8)
    del tensor
    _kept, second = placed(arena, (arena.nbytes,), torch.uint8)
    assert first.offset == second.offset
    assert second.generation > first.generation


def _read_after_arena_and_segment_are_gone(name: str, dtype: torch.dtype) -> None:
    segment = Segment.attach(name, hold=False)
    tensor = Arena(segment).empty((8,), dtype).fill_(5)
    segment.close()
    del segment
    gc.collect()
    assert tensor.sum().item() == 40


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16], ids=str)
def test_a_tensor_outlives_its_arena_and_its_closed_segment(segment: Segment, in_child: InChild, dtype: torch.dtype) -> None:
    """A1. In a child, which alone would die of reading what is no longer mapped."""
    in_child(lambda: _read_after_arena_and_segment_are_gone(segment.name, dtype))


def _read_a_tensor_after_closing(instance: str) -> None:
    name = names.segment_name(instance, names.new_id())
    maker = make_segment(name, GEOMETRY, instance=instance, owner="test", owner_pid=os.getpid())
    segment = Segment.attach(name, hold=True)
    maker.release()
    arena = Arena(segment)
    tensor = arena.empty((64,), torch.int64).copy_(torch.arange(64))
    view = tensor[8:]
    segment.close()
    unlink_segment(name)
    del tensor, arena, segment
    assert view.tolist() == list(range(8, 64))
    view.fill_(7)
    assert int(view.sum()) == 7 * 56
    assert is_mapped(name)
    del view
    assert not is_mapped(name)


def test_closing_a_segment_under_a_living_tensor_keeps_it_readable_until_it_dies(instance: str, in_child: InChild) -> None:
    """A1. In a child, which alone would die of reading what is no longer mapped."""
    in_child(lambda: _read_a_tensor_after_closing(instance))


def test_a_lease_is_known_by_where_its_block_begins_until_the_block_is_released(arena: Arena) -> None:
    """What begins where a living block does is found by that alone, without a search."""
    kept = [placed(arena, (5,), dtype) for dtype in CODE_OF]
    assert {offset: block.generation for offset, block in arena.blocks.items()} == {place.offset: place.generation for _, place in kept}
    del kept[3:]
    arena.occupancy()
    assert set(arena.blocks) == {place.offset for _, place in kept}
    assert all(block.held for block in arena.blocks.values())


@property_settings
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9000), st.integers(0, 1 << 16)), max_size=60))
def test_no_block_is_recycled_under_a_living_view_whatever_is_placed_and_dropped(
    segment: Segment, actions: list[tuple[int, int, int]]
) -> None:
    """A1: every living view reads what was written into it, however it came to be."""
    arena = Arena(segment)
    living: list[tuple[object, int]] = []

    def checksum(view: object) -> int:
        return zlib.crc32(np.asarray(view).tobytes())

    for number, (action, nbytes, pick) in enumerate(actions):
        if action < 2:
            try:
                tensor = arena.empty((nbytes,), torch.uint8, 0.0)
            except ArenaFull:
                continue
            tensor.copy_(torch.from_numpy(np.random.default_rng(number).integers(0, 256, nbytes, dtype=np.uint8)))
            living.append((tensor, checksum(tensor)))
        elif living and action == 2:
            del living[pick % len(living)]
        elif living:
            view, _ = living.pop(pick % len(living))
            start = pick % 7
            narrower = [np.asarray(view)[start:], torch.from_numpy(np.asarray(view))[start:], memoryview(np.asarray(view))[start:]][
                pick % 3
            ]
            living.append((narrower, checksum(narrower)))
        view = tensor = narrower = None  # type: ignore[assignment]
        assert [checksum(view) for view, _ in living] == [expected for _, expected in living]
        assert blocks_in(arena) == len(living)
    living.clear()
    assert blocks_in(arena) == 0


# --- releasing at any moment (A2) --------------------------------------------------------------------------------------------------------


def _place_while_garbage_dies_at_every_allocation(arena: Arena) -> None:
    rooms = itertools.cycle([Room((5, 7), torch.float32), Room((5, 7), torch.bfloat16)])
    for allocations in list(range(40)) * 5:
        gc.collect()
        gc.disable()
        for _ in range(3):
            Cycle(arena.empty((3 * UNIT,), torch.uint8))
        room = next(rooms)  # made beforehand, so that the next allocations are those inside the lock
        gc.set_threshold(gc.get_count()[0] + allocations, 1, 1)
        gc.enable()
        kept = arena.place(room)[0].fill_(allocations)
        inert = [[] for _ in range(50)]  # type: ignore[var-annotated]
        assert kept.eq(allocations).all()
        assert len(inert) == 50


UNDER_THE_LOCK = {RingAllocator.place.__code__, PythonLeases.tensor.__code__}
"""What an arena calls while it holds its lock."""


@pytest.mark.usefixtures("eager_gc")
def test_a_release_in_a_collection_at_any_point_of_placing_neither_blocks_nor_is_lost(arena: Arena, flavour: str) -> None:
    """A2: the collector is made to run after each possible number of allocations, and inside the lock as well."""
    seen: set[bool] = set()

    def look(phase: str, info: dict[str, int]) -> None:
        seen.add(any(frame.f_code in UNDER_THE_LOCK for frame, _ in traceback.walk_stack(None)))

    gc.callbacks.append(look)
    try:
        InThread(lambda: _place_while_garbage_dies_at_every_allocation(arena)).join()
    finally:
        gc.callbacks.remove(look)
    # Compiled, nothing that the collector counts is allocated under the lock.
    assert seen == {False, True} or (flavour == "compiled" and seen == {False})
    gc.collect()
    assert blocks_in(arena) == 0


def _place_check_and_drop(arena: Arena, seed: int, rounds: int) -> None:
    choose = random.Random(seed)
    held: list[tuple[torch.Tensor, int]] = []
    for number in range(rounds):
        mark = seed * rounds + number
        tensor = arena.empty((choose.randrange(1, 300),), torch.int64, STUCK_SECONDS).fill_(mark)
        if choose.random() < 0.5:
            held.append((tensor, mark))
        else:
            Cycle(tensor)
        while len(held) > choose.randrange(6):
            view, expected = held.pop(choose.randrange(len(held)))
            assert view.eq(expected).all(), "a block was recycled under a living tensor"


@pytest.mark.usefixtures("eager_gc")
def test_threads_that_place_and_drop_amid_collections_never_share_a_block_and_never_get_stuck(arena: Arena) -> None:
    """A1, A2: releases come from the collector, in whichever thread it runs."""
    threads = [InThread(lambda seed=seed: _place_check_and_drop(arena, seed, 400)) for seed in range(4)]
    for thread in threads:
        thread.join()
    gc.collect()
    assert blocks_in(arena) == 0


def test_blocks_come_back_the_longest_dead_first_also_when_somebody_waited_for_one(segment: Segment) -> None:
    leases = leases_over(segment.map)
    ring = RingAllocator(GEOMETRY.arena_offset, GEOMETRY.arena_bytes)
    room = room_for((UNIT // 4,), torch.float32)
    blocks = [ring.place(UNIT) for _ in range(3)]
    tensors = [leases.tensor(room, block.offset, block) for block in blocks if block is not None]
    while tensors:
        del tensors[0]
        leases.wait(STUCK_SECONDS)
    assert [leases.pop() for _ in range(4)] == [*blocks, None]
