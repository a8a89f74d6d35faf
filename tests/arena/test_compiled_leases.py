"""Leases in C and in Python by themselves: what they refuse, and that what was never made raises."""

from __future__ import annotations

import gc
import mmap
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from shmbroker.arena import leases as leases_module
from shmbroker.arena.leases import leases_over
from shmbroker.arena.ring import Extent
from shmbroker.arena.room import Room
from shmbroker.memory import compiled, layout

NBYTES = 4 * layout.PAGE
ROOM = Room((3, 5), torch.float32)


@pytest.fixture(params=["python", "compiled"])
def leases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of each kind, over memory of their own."""
    if request.param == "compiled":
        pytest.importorskip("shmbroker.arena._leases", reason="built without a C compiler")
    monkeypatch.setattr(compiled, "WANTED", request.param == "compiled")
    return leases_over(mmap.mmap(-1, NBYTES))


@pytest.fixture
def compiled_leases() -> ModuleType:
    return pytest.importorskip("shmbroker.arena._leases", reason="built without a C compiler")  # type: ignore[no-any-return]


def block_at(offset: int) -> Extent:
    return Extent(offset, layout.ALIGNMENT)


USES: dict[str, Callable[[Any], object]] = {
    "tensor": lambda leases: leases.tensor(ROOM, 0, block_at(0)),
    "pop": lambda leases: leases.pop(),
    "wait": lambda leases: leases.wait(0.0),
}


# --- making ---------------------------------------------------------------------------------------------------------------------------


def raises_for_never_made(leases: Any) -> None:
    for use in USES.values():
        with pytest.raises(RuntimeError, match="never made"):
            use(leases)
    for wrong in (lambda: leases.tensor(), lambda: leases.wait("long")):
        with pytest.raises(RuntimeError, match="never made"):
            wrong()


def test_leases_that_were_never_made_raise(compiled_leases: ModuleType) -> None:
    kind = compiled_leases.Leases
    assert {method for method in vars(kind) if not method.startswith("_")} == set(USES), "a method that this test does not know"
    raises_for_never_made(kind.__new__(kind))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        ((bytearray(8),), TypeError),
        ((5, torch.zeros), TypeError),
        ((None, torch.zeros), TypeError),
        ((b"which nobody may write", torch.zeros), BufferError),
    ],
    ids=["nothing", "no from_dlpack", "a number", "None", "read-only"],
)
def test_a_making_that_failed_leaves_nothing_half_made(
    compiled_leases: ModuleType, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    leases = compiled_leases.Leases.__new__(compiled_leases.Leases)
    with pytest.raises(error):
        leases.__init__(*arguments)
    raises_for_never_made(leases)
    memory = bytearray(NBYTES)
    leases.__init__(memory, from_dlpack)
    for use in USES.values():
        use(leases)


def from_dlpack(capsule: object) -> torch.Tensor:
    return torch.utils.dlpack.from_dlpack(capsule)


def test_leases_are_made_once_and_keep_their_memory_until_the_last_tensor_over_it_dies(compiled_leases: ModuleType) -> None:
    first, second = bytearray(NBYTES), bytearray(NBYTES)
    leases = compiled_leases.Leases(first, from_dlpack)
    with pytest.raises(RuntimeError, match="made once"):
        leases.__init__(second, from_dlpack)
    second.append(0)  # which raises BufferError while anything has it
    tensor = leases.tensor(ROOM, 256, block_at(256)).fill_(1)
    del leases
    with pytest.raises(BufferError):
        first.append(0)
    assert tensor.sum() == 15
    del tensor
    first.append(0)


# --- what does not fit ----------------------------------------------------------------------------------------------------------------

OFFSETS: dict[str, tuple[Any, type[Exception]]] = {
    "before the mapping": (-1, ValueError),
    "a whole block before it": (-layout.ALIGNMENT, ValueError),
    "far before it": (-(1 << 70), ValueError),
    "partly behind it": (NBYTES - 8, ValueError),
    "at its end": (NBYTES, ValueError),
    "behind it": (NBYTES + layout.ALIGNMENT, ValueError),
    "beyond 63 bits": (1 << 63, ValueError),
    "beyond 64 bits": (1 << 64, ValueError),
    "a fraction": (1.5, TypeError),
    "a text": ("0", TypeError),
    "None": (None, TypeError),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", OFFSETS)
def test_a_tensor_that_does_not_lie_in_the_mapping_is_refused_and_nothing_is_lent(leases: Any, dtype: torch.dtype, case: str) -> None:
    offset, error = OFFSETS[case]
    with pytest.raises(error):
        leases.tensor(Room((3, 5), dtype), offset, block_at(0))
    gc.collect()
    assert leases.pop() is None


@pytest.mark.parametrize("shape", [(NBYTES // 4 + 1,), (1 << 20, 1 << 20)], ids=str)
def test_a_tensor_larger_than_the_mapping_is_refused(leases: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        leases.tensor(Room(shape, torch.float32), 0, block_at(0))
    assert leases.pop() is None


@pytest.mark.parametrize("form", [b"", bytes(71), bytes(73), "text", None, 5])
def test_what_is_no_form_is_refused(compiled_leases: ModuleType, form: Any) -> None:
    leases = compiled_leases.Leases(bytearray(NBYTES), from_dlpack)
    with pytest.raises(TypeError, match="form is 72 bytes"):
        leases.tensor(SimpleNamespace(form=form), 0, block_at(0))
    with pytest.raises(AttributeError):
        leases.tensor(form, 0, block_at(0))


def form_of(bits: int = 32, dimensions: int = 1, shape: tuple[int, ...] = (4,)) -> bytes:
    sizes = (*shape, *(0,) * (layout.MAX_DIMS - len(shape)))
    return (
        bytes([2, bits, 0, 0])
        + dimensions.to_bytes(4, "little", signed=True)
        + b"".join(n.to_bytes(8, "little", signed=True) for n in sizes)
    )


@pytest.mark.parametrize(
    "form",
    [
        form_of(dimensions=-1),
        form_of(dimensions=layout.MAX_DIMS + 1),
        form_of(dimensions=1 << 30),
        form_of(shape=(-1,)),
        form_of(bits=4),
        form_of(dimensions=2, shape=(1 << 62, 1 << 62)),
        form_of(dimensions=8, shape=(1 << 8,) * 8),
        form_of(dimensions=2, shape=(1 << 32, 1 << 32)),
    ],
    ids=["-1 dimensions", "9 dimensions", "2**30 dimensions", "a negative size", "half a byte", "2**124", "2**64", "2**64 again"],
)
def test_a_form_whose_bytes_cannot_be_counted_is_refused(compiled_leases: ModuleType, form: bytes) -> None:
    leases = compiled_leases.Leases(bytearray(NBYTES), from_dlpack)
    with pytest.raises(ValueError, match="does not lie in"):
        leases.tensor(SimpleNamespace(form=form), 0, block_at(0))


TIMES: dict[str, tuple[Any, type[Exception]]] = {
    "negative": (-1, ValueError),
    "negative by little": (-1e-9, ValueError),
    "none (NaN)": (float("nan"), ValueError),
    "endlessly negative": (float("-inf"), OverflowError),
    "beyond all clocks": (1e10, OverflowError),
    "endless": (float("inf"), OverflowError),
    "a text": ("1", TypeError),
    "bytes": (b"1", TypeError),
}


@pytest.mark.parametrize("case", TIMES)
def test_a_wait_for_what_is_no_time_is_refused(leases: Any, case: str) -> None:
    seconds, error = TIMES[case]
    with pytest.raises(error):
        leases.wait(seconds)


@pytest.mark.parametrize("seconds", [0, 0.0, True, 1e-4, 1])
def test_a_wait_lasts_no_longer_than_it_may(leases: Any, seconds: float) -> None:
    leases.wait(seconds)
    assert leases.pop() is None


def test_a_wait_beyond_a_day_ends_with_the_death_of_a_lease(leases: Any) -> None:
    tensors = [leases.tensor(ROOM, 0, block_at(0))]
    thread = threading.Thread(target=lambda: leases.wait(1e6))
    thread.start()
    tensors.clear()
    thread.join(60.0)
    assert not thread.is_alive()
    assert leases.pop() is not None


def test_a_block_whose_tensor_could_not_be_made_is_given_back(compiled_leases: ModuleType) -> None:
    def refuses(capsule: object) -> torch.Tensor:
        raise LookupError("no tensor")

    memory = bytearray(NBYTES)
    leases = compiled_leases.Leases(memory, refuses)
    block = block_at(256)
    with pytest.raises(LookupError, match="no tensor"):
        leases.tensor(ROOM, 256, block)
    gc.collect()
    assert leases.pop() is block
    assert leases.pop() is None
    del leases
    memory.append(0)


def test_every_kind_of_leases_is_used_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = pytest.importorskip("shmbroker.arena._leases", reason="built without a C compiler").Leases
    assert leases_module.compiled is compiled
    for wanted in (True, False):
        monkeypatch.setattr(compiled, "WANTED", wanted)
        assert isinstance(leases_over(mmap.mmap(-1, NBYTES)), kind) == wanted
