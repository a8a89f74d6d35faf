"""Products on the CPU: small ones are computed by one thread, and nothing else is different for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu_worker.device import CpuDevice


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "rows", "inner", "outputs"), [(9, 1, 64, 40), (3, 3, 64, 40), (3, 3, 40, 64), (1, 1, 1, 1), (0, 1, 2, 3), (2, 200, 64, 200)]
)
def test_a_batch_of_products_has_the_bits_of_torchs_whatever_its_size(
    threads: int, batch: int, rows: int, inner: int, outputs: int
) -> None:
    torch.manual_seed(batch + rows)
    a, b = torch.randn(batch, rows, inner), torch.randn(batch, outputs, inner).transpose(1, 2)
    out = torch.full((batch, rows, outputs), float("nan"))
    CpuDevice().matmul(a, b, out)
    assert torch.equal(out, torch.bmm(a, b))
    assert torch.get_num_threads() == threads


def test_threads_are_as_before_also_when_a_product_fails(threads: int) -> None:
    with pytest.raises(RuntimeError):
        CpuDevice().matmul(torch.ones(1, 2, 3), torch.ones(1, 4, 5), torch.empty(1, 2, 5))
    assert torch.get_num_threads() == threads
