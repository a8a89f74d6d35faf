"""Calls in pieces: what is written is what the whole call writes, and pieces take about as long as they are to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.device import CpuDevice
from gpu_worker.ops import Linear
from shmbroker.arena.spec import TensorSpec
from shmbroker.errors import BadInput
from shmbroker.worker.ops import OpDefinition
from shmbroker.worker.pieces import LEAST_ROWS, PIECE_NS, STEP_ROWS, Pieces, PieceSize


def run_in_pieces(pieces: Pieces) -> list[int]:
    """All of a call; the units of each piece."""
    units, run = pieces.begin()
    sizes: list[int] = []
    while sum(sizes) < units:
        sizes.append(pieces.size.next(units - sum(sizes)))
        run(sum(sizes[:-1]), sum(sizes))
    return sizes


def same_but_wider(x: TensorSpec, width: int) -> TensorSpec:
    return TensorSpec((*x.shape[:-1], width), x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [128, 257, 777])
def test_a_product_in_tiles_is_the_whole_product_bit_by_bit(dtype: torch.dtype, bias: bool, rows: int) -> None:
    """So splits are token-identical whoever else calls."""
    torch.manual_seed(rows)
    layers = [(torch.randn(width, 320).to(dtype).t(), torch.randn(width).to(dtype) if bias else None) for width in (1000, 1536, 1)]
    x = torch.randn(1, rows, 320).to(dtype)
    linear = Linear(CpuDevice(), layers, 320)
    whole = [torch.empty(1, rows, weight.shape[1], dtype=dtype) for weight, _ in layers]
    linear(x, out=whole)
    parts = [torch.full_like(one, float("nan")) for one in whole]
    tiles = linear.tiles(x, out=parts)
    assert len(tiles) > 3 or dtype is torch.float32
    for tile in tiles:
        tile()
    assert [torch.equal(one, other) for one, other in zip(whole, parts, strict=True)] == [True] * 3


@settings(deadline=None, max_examples=60)
@given(st.integers(2 * LEAST_ROWS, 1500), st.integers(1, 40), st.integers(2, 40), st.integers(1, 40))
def test_a_row_wise_product_in_pieces_is_the_whole_product_bit_by_bit(rows: int, size: int, width: int, wide: int) -> None:
    def function(x: torch.Tensor, *, out: torch.Tensor, width: int) -> None:
        torch.mm(x.reshape(-1, x.shape[-1]), weight, out=out.view(-1, width))

    torch.manual_seed(rows)
    weight = torch.randn(wide, width)
    op = OpDefinition("product", function, same_but_wider, row_wise=True).bind({"width": width}, {})
    x, whole, parts = torch.randn(rows, wide), torch.empty(rows, width), torch.empty(rows, width)
    op.prepare((x,), (whole,), {}, single=True)()
    pieces = op.pieces((x,), (parts,), {}, single=True)
    assert pieces is not None
    pieces.size.units = max(LEAST_ROWS, size * STEP_ROWS)
    sizes = run_in_pieces(pieces)
    assert sum(sizes) == rows
    assert min(sizes) >= LEAST_ROWS
    assert torch.equal(whole, parts)


def test_ids_without_a_width_are_rows_too() -> None:
    table = torch.randn(50, 8)

    def embed(ids: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.index_select(table, 0, ids.reshape(-1), out=out.view(-1, 8))

    op = OpDefinition("embed", embed, lambda ids: TensorSpec((*ids.shape, 8), torch.float32), row_wise=True).bind({}, {})
    ids, out = torch.randint(50, (2, 200)), torch.empty(2, 200, 8)
    pieces = op.pieces((ids,), (out,), {}, single=True)
    assert pieces is not None
    run_in_pieces(pieces)
    assert torch.equal(out, table[ids])


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.ones(2 * LEAST_ROWS - 1, 4), torch.ones(2 * LEAST_ROWS - 1, 4)),
        (torch.ones(4, 256).t(), torch.ones(256, 4)),
        (torch.ones(256, 4), torch.ones(4, 256).t()),
        (torch.ones(512, 4), torch.ones(256, 4)),
    ],
    ids=["too short", "input not by rows", "output not by rows", "other rows"],
)
def test_what_does_not_lie_row_by_row_is_run_as_a_whole(x: torch.Tensor, out: torch.Tensor) -> None:
    op = OpDefinition("copy", lambda x, *, out: None, lambda x: x, row_wise=True).bind({}, {})
    assert op.pieces((x,), (out,), {}, single=True) is None


def test_an_op_that_says_nothing_is_run_as_a_whole() -> None:
    op = OpDefinition("copy", lambda x, *, out: None, lambda x: x).bind({}, {})
    assert op.pieces((torch.ones(512, 4),), (torch.ones(512, 4),), {}, single=True) is None


def test_an_op_that_works_in_place_is_not_row_wise() -> None:
    with pytest.raises(BadInput, match="cannot write into its inputs in place and be run row by row"):
        OpDefinition("relu_", lambda x, *, out: None, lambda x: x, in_place=True, row_wise=True)


@settings(deadline=None)
@given(st.integers(1_000, 10_000_000))
def test_pieces_come_to_take_what_they_are_to(row_ns: int) -> None:
    size = PieceSize()
    for _ in range(20):
        size.measured(size.units, size.units * row_ns)
    assert size.units >= LEAST_ROWS
    if size.units > LEAST_ROWS:
        assert abs(size.units * row_ns - PIECE_NS) <= STEP_ROWS * row_ns + PIECE_NS // 50


def test_the_rest_of_a_call_makes_no_piece_larger() -> None:
    size = PieceSize()
    for _ in range(5):
        size.measured(size.units, size.units * 1000)
    before = size.units
    size.measured(100, 1)
    assert size.units == before
    size.measured(100, 2 * PIECE_NS)
    assert size.units == before // 2
