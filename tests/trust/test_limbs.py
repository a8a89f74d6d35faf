"""Products of integers as a GPU makes them, of limbs of 8 bits, and as several threads do: bitwise the exact ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.limbs import LimbProduct, limbs_of
from gpu_worker.device import CpuDevice
from shmbroker.trust.bits import BITS
from shmbroker.trust.quantization import IntegerWeight

Int32 = st.integers(-(2**31), 2**31 - 1)


def weight_of(rows: int, columns: int, bits: int) -> IntegerWeight:
    largest = 2 ** (bits - 1) - 1
    return IntegerWeight(torch.randint(-largest, largest + 1, (rows, columns), dtype=torch.int16), torch.ones(rows), bits)


def exact(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    return (x.to(torch.int64) @ weight.integers.to(torch.int64).t()).to(torch.int32)


@settings(deadline=None)
@given(st.lists(Int32, min_size=1, max_size=20))
def test_limbs_are_the_integer(values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.int32)
    together = sum(limb.to(torch.int64) << (8 * place) for place, limb in enumerate(limbs_of(x, 4)))
    assert torch.equal(torch.as_tensor(together).to(torch.int32), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 1, 1), (5, 51, 37), (17, 64, 8), (40, 700, 33)])
def test_a_product_of_limbs_is_exact(bits: int, rows: int, columns: int, outputs: int) -> None:
    torch.manual_seed(bits)
    weight = weight_of(outputs, columns, bits)
    x = torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)
    x[0, 0] = -(2**31)
    out = torch.empty(rows, outputs, dtype=torch.int32)
    LimbProduct(weight, torch.device("cpu"))(x, out)
    assert torch.equal(out, exact(x, weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 96, 10), (3, 900, 1037)])
def test_a_product_of_several_threads_is_exact(threads: int, rows: int, columns: int, outputs: int) -> None:
    weight = weight_of(outputs, columns, 12)
    x = torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)
    out = torch.empty(rows, outputs, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        CpuDevice().ring_product(weight)(x, out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, exact(x, weight))
