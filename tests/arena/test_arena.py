"""The arena: who keeps a block, where a tensor lies, what happens when there is no room. Invariants A1 to A4."""

from __future__ import annotations

import gc
import itertools
import random
import re
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmbroker.arena.arena import Arena, Location, Room
from shmbroker.arena.ring import Extent, largest_request
from shmbroker.arena.spec import CODE_OF, NUMPY_OF
from shmbroker.errors import ArenaBusy, ArenaFull, ArenaTooSmall, BadInput
from shmbroker.memory import compiled, layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment
from tests.conftest import InChild, SegmentOf

UNIT = layout.ALIGNMENT
GEOMETRY = Geometry(arena_bytes=16 * layout.PAGE, channel_count=1, depth=1)

STUCK_SECONDS = 40.0
"""Far beyond what any of this takes: who is not done by then is stuck."""

# The segment of a fixture serves all examples of a property; each example has an arena of its own over it.
property_settings = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["python", "compiled"], autouse=True)
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything here holds for the leases in Python and for the compiled ones alike."""
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
def without_gc() -> Iterator[None]:
    """The collector runs only when a test or the arena calls it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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


class Cycle:
    """Garbage that only the collector finds, with a tensor in it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.me = self


def _place(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Location]:
    tensor, offset, generation = arena.place(Room(shape, dtype))
    return tensor, Location(offset, generation)


def _blocks(arena: Arena) -> int:
    return arena.occupancy().blocks


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _fill(arena: Arena, units: int) -> list[torch.Tensor]:
    """The whole arena in blocks of ``units`` alignments."""
    return [arena.empty((units * UNIT,), torch.uint8) for _ in range(arena.nbytes // (units * UNIT))]


def _in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Starts ``work``; the returned call waits for its end and gives its result, or raises what it raised."""
    outcome: list[object] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> object:
        thread.join(STUCK_SECONDS)
        assert not thread.is_alive(), "stuck"
        if failure:
            raise failure[0]
        return outcome[0]

    return join


# --- leases (A1) -----------------------------------------------------------------------------------------------------------------------


def test_block_is_reclaimed_only_after_the_last_view_dies(arena: Arena) -> None:
    """A1, through views of views."""
    tensor = arena.empty((4, 8), torch.float32)
    view = tensor[1:]
    view_of_view = view.T[2:4]
    del tensor
    assert _blocks(arena) == 1
    del view
    assert _blocks(arena) == 1
    del view_of_view
    assert _blocks(arena) == 0


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
    assert _blocks(arena) == 1
    holder.clear()
    assert _blocks(arena) == 0


def test_a_graph_that_saved_a_tensor_for_backward_keeps_its_block(arena: Arena) -> None:
    """A1."""
    weight = torch.ones(4, requires_grad=True)
    tensor = arena.empty((4,), torch.float32).copy_(torch.arange(4.0))
    loss = (weight * tensor).sum()
    del tensor
    assert _blocks(arena) == 1
    loss.backward()
    del loss
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert _blocks(arena) == 0


def test_a_copy_keeps_nothing(arena: Arena) -> None:
    copies = [arena.empty((4,), torch.float32).zero_().clone(), arena.empty((4,), torch.float32).zero_().numpy().copy()]
    assert len(copies) == 2
    assert _blocks(arena) == 0


def test_a_block_that_died_is_placed_again_with_a_new_generation(arena: Arena) -> None:
    tensor, first = _place(arena, (arena.nbytes,), torch.uint8)
    del tensor
    _kept, second = _place(arena, (arena.nbytes,), torch.uint8)
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
    """In a child, which alone would die of reading what is no longer mapped."""
    in_child(lambda: _read_after_arena_and_segment_are_gone(segment.name, dtype))


# --- shapes, dtypes and the bytes themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODE_OF, ids=str)
@pytest.mark.parametrize("ndim", range(9))
def test_every_carried_dtype_and_rank_is_placed_contiguous_and_aliases_the_segment(
    segment: Segment, arena: Arena, dtype: torch.dtype, ndim: int
) -> None:
    shape = (2, 3, 1, 2, 1, 2, 1, 2)[:ndim]
    tensor, place = _place(arena, shape, dtype)
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
    tensor, place = _place(arena, shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.numel()) == (shape, dtype, 0)
    assert tensor.stride() == torch.empty(shape, dtype=dtype).stride()
    assert GEOMETRY.arena_offset <= place.offset < GEOMETRY.total_bytes
    assert _blocks(arena) == 1
    del tensor
    assert _blocks(arena) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.uint64])
def test_a_dtype_that_no_frame_carries_is_refused(arena: Arena, dtype: torch.dtype) -> None:
    for place in (lambda: arena.empty((1,), dtype), lambda: Room((1,), dtype), lambda: arena.copy_in(torch.empty(1, dtype=dtype))):
        with pytest.raises(BadInput, match=f"{dtype} cannot be handed over; carried are: float32, "):
            place()
    assert _blocks(arena) == 0


def test_nine_dimensions_are_refused(arena: Arena) -> None:
    nine = (1,) * 9
    for place in (lambda: arena.empty(nine, torch.int8), lambda: Room(nine, torch.int8), lambda: arena.copy_in(torch.zeros(nine))):
        with pytest.raises(BadInput, match="9 dimensions cannot be handed over; at most 8"):
            place()


def test_a_negative_dimension_is_refused(arena: Arena) -> None:
    for place in (lambda: arena.empty((2, -1), torch.int8), lambda: Room((2, -1), torch.int8)):
        with pytest.raises(BadInput, match=r"shape \[2, -1\] cannot be used: dimensions are whole numbers"):
            place()
    assert _blocks(arena) == 0


def test_one_room_is_placed_many_times_each_in_a_block_of_its_own(arena: Arena) -> None:
    room = Room((3, 5), torch.int32)
    assert (room.shape, room.dtype, room.count, room.nbytes) == ((3, 5), torch.int32, 15, UNIT)
    tensors = [arena.place(room)[0].fill_(number) for number in range(4)]
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
    assert (_blocks(arena), arena.occupancy().held_bytes) == (4, 4 * UNIT)


def test_the_offset_that_is_told_leads_from_the_start_of_the_segment_to_the_first_element(arena: Arena) -> None:
    for dtype in CODE_OF:
        tensor, place = _place(arena, (7,), dtype)
        assert tensor.data_ptr() - arena.address == place.offset


def test_generations_in_an_arena_are_those_of_the_blocks_in_order_of_placing(arena: Arena) -> None:
    kept = [_place(arena, (1,), torch.int8) for _ in range(5)]
    assert [place.generation for _, place in kept] == [1, 2, 3, 4, 5]


def test_a_lease_is_known_by_where_its_block_begins_until_the_block_is_released(arena: Arena) -> None:
    """What begins where a living block does is found by that alone, without a search."""
    kept = [_place(arena, (5,), dtype) for dtype in CODE_OF]
    assert {offset: block.generation for offset, block in arena.blocks.items()} == {place[0]: place[1] for _, place in kept}
    del kept[3:]
    arena.occupancy()
    assert set(arena.blocks) == {place.offset for _, place in kept}
    assert all(block.held for block in arena.blocks.values())


def test_copying_in_makes_a_contiguous_equal_that_shares_nothing_with_the_original(arena: Arena) -> None:
    outside = torch.arange(24.0).view(4, 6).T[::2].requires_grad_()
    inside = arena.copy_in(outside)
    assert inside.is_contiguous()
    assert not inside.requires_grad
    assert torch.equal(inside, outside)
    assert arena.find(inside) is not None
    inside.zero_()
    assert outside.sum().item() != 0


# --- finding (A3) ----------------------------------------------------------------------------------------------------------------------


def test_a_tensor_is_found_where_it_was_placed(arena: Arena) -> None:
    """A3."""
    for _ in range(3):
        tensor, place = _place(arena, (4, 8), torch.float32)
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
    tensor, place = _place(arena, (4, 8), torch.float32)
    neighbours.append(arena.empty((3,), torch.float32))
    found = arena.find(view(tensor))
    assert found is not None
    assert found.offset == place.offset + elements * 4
    assert found.generation == place.generation


def test_tensors_outside_are_not_found(segment: Segment, arena: Arena, segment_of: SegmentOf) -> None:
    """A3: not those of another arena, of the segment's other parts, or of a part of the arena in which no block lies."""
    inside, place = _place(arena, (UNIT,), torch.uint8)
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
    view, place = _place(arena, tuple(shape), torch.float32)
    base = view.data_ptr()
    for axis, start, step, through_numpy in cuts:
        axis %= view.dim()
        start = min(start, view.shape[axis] - 1)
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
        if through_numpy:
            view = torch.from_numpy(view.numpy())
    found = arena.find(view)
    assert found is not None
    assert found == (place.offset + view.data_ptr() - base, place.generation)
    assert len(neighbours) == before


# --- no room (A4) ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.0, 0.02])
def test_a_full_arena_says_after_the_timeout_what_was_asked_what_is_free_and_who_holds(arena: Arena, timeout: float) -> None:
    """A4."""
    held = _fill(arena, 16)
    del held[1], held[3]
    with pytest.raises(ArenaFull) as caught:
        arena.empty((5000,), torch.uint8, timeout)
    told = re.fullmatch(
        r"(\d+) bytes asked, (\d+) free \(largest extent (\d+) of (\d+)\) and nothing released within ([\d.]+) s; "
        r"(\d+) blocks held, oldest: (.*); let go of tensors .* raise --arena .*",
        str(caught.value),
    )
    assert told is not None, str(caught.value)
    asked = largest_request(5000)
    assert [float(figure) for figure in told.groups()[:6]] == [asked, 8192, 4096, arena.nbytes, timeout, len(held)]
    first = GEOMETRY.arena_offset
    assert re.fullmatch(
        rf"4096 bytes at {first}, held [\d.]+ s; 4096 bytes at {first + 2 * 4096}, held .* s; 4096 bytes at {first + 3 * 4096}, held .* s",
        told[7],
    )
    assert not isinstance(caught.value, ArenaTooSmall)
    assert isinstance(caught.value, MemoryError)


def test_after_a_refusal_the_arena_works_on(arena: Arena) -> None:
    held = _fill(arena, 16)
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
    held = _fill(arena, 32)
    known = threading.Event()
    numbers: list[int] = []

    def place() -> int:
        collected_by(threading.get_ident())
        numbers.append(threading.get_ident())
        known.set()
        return arena.empty((32 * UNIT,), torch.uint8, STUCK_SECONDS).fill_(9).numel()

    join = _in_thread(place)
    assert known.wait(STUCK_SECONDS)
    assert collected_by(numbers[0]).wait(STUCK_SECONDS), "it never came to wait"
    held.pop(3)
    assert join() == 32 * UNIT


def test_all_who_wait_get_room_when_one_block_that_is_large_enough_for_them_is_released(arena: Arena) -> None:
    """A4: the thread that takes the news leaves room over for the others, and they see it."""
    held = [arena.empty((arena.nbytes,), torch.uint8)]
    joins = [_in_thread(lambda: arena.empty((UNIT,), torch.uint8, STUCK_SECONDS)) for _ in range(6)]
    held.clear()
    tensors = [join() for join in joins]
    assert len({tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}) == 6


@pytest.mark.usefixtures("without_gc")
def test_garbage_in_a_reference_cycle_is_collected_before_a_full_arena_complains(arena: Arena) -> None:
    """A4: an exception's traceback, most often."""
    for tensor in _fill(arena, 64):
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
    _in_thread(lambda: arena.empty((UNIT,), torch.uint8, STUCK_SECONDS))()
    assert seen == [1]


# --- used by a finaliser -----------------------------------------------------------------------------------------------------------------

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
    place = arena._ring.place
    refused: list[str] = []

    def place_and_collect(nbytes: int) -> Extent | None:
        """Stands for an allocation at which the collector meets an object whose finaliser uses the arena."""
        arena._ring.place = place
        try:
            use(arena, living[0])
        except ArenaBusy as error:
            refused.append(str(error))
        return place(nbytes)

    arena._ring.place = place_and_collect
    living.append(arena.empty((8,), torch.int64).fill_(2))
    assert len(refused) == 1
    assert "finaliser" in refused[0]
    assert [tensor.tolist() for tensor in living] == [[1] * 8, [2] * 8], "the placing that was interrupted is none the worse"
    assert _blocks(arena) == 2
    use(arena, living[0])  # afterwards it may
    living.clear()
    assert _blocks(arena) == 0


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
    assert _blocks(arena) == 0
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


def _use_while_another_thread_places(arena: Arena, use: Callable[[Arena, torch.Tensor], object]) -> None:
    known = arena.empty((8,), torch.int64)
    place = arena._ring.place
    inside, waiting = threading.Event(), threading.Event()

    def place_slowly(nbytes: int) -> Extent | None:
        arena._ring.place = place
        inside.set()
        assert waiting.wait(STUCK_SECONDS)
        return place(nbytes)

    arena._ring.place = place_slowly  # type: ignore[method-assign]
    arena._lock = TellsOfWaiting(arena._lock, waiting)  # type: ignore[assignment]
    join_slow = _in_thread(lambda: arena.empty((8,), torch.int64))
    assert inside.wait(STUCK_SECONDS)
    join = _in_thread(lambda: use(arena, known))
    join_slow()
    join()


@pytest.mark.parametrize("use", [name for name in USES if "more than" not in name])
def test_who_uses_the_arena_while_another_thread_places_waits_for_that_one_and_is_served(
    segment: Segment, in_child: InChild, use: str
) -> None:
    in_child(lambda: _use_while_another_thread_places(Arena(segment), USES[use]))


# --- releasing at any moment (A2), and never too early (A1) -------------------------------------------------------------------------


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


@pytest.mark.usefixtures("eager_gc")
def test_a_release_in_a_collection_at_any_point_of_placing_neither_blocks_nor_is_lost(arena: Arena, flavour: str) -> None:
    """A2: the collector is made to run after each possible number of allocations, and inside the lock as well."""
    seen: set[bool] = set()

    def look(phase: str, info: dict[str, int]) -> None:
        seen.add(arena._busy)

    gc.callbacks.append(look)
    try:
        _in_thread(lambda: _place_while_garbage_dies_at_every_allocation(arena))()
    finally:
        gc.callbacks.remove(look)
    # Compiled, nothing that the collector counts is allocated under the lock.
    assert seen == {False, True} or (flavour == "compiled" and seen == {False})
    gc.collect()
    assert _blocks(arena) == 0


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
    joins = [_in_thread(lambda seed=seed: _place_check_and_drop(arena, seed, 400)) for seed in range(4)]
    for join in joins:
        join()
    gc.collect()
    assert _blocks(arena) == 0


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
        assert _blocks(arena) == len(living)
    living.clear()
    assert _blocks(arena) == 0
