"""Products of a few rows: the same bits as torch's, however they are computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.few_rows import BLOCK, MOST_ROWS, FewRows, in_blocks, whole


@settings(deadline=None, max_examples=60)
@given(st.integers(1, MOST_ROWS + 2), st.integers(1, 700), st.integers(1, 40), st.integers(0, 1), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_product_has_the_bits_of_torchs(rows: int, inputs: int, blocks: int, more: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    outputs = blocks * BLOCK + more
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).t()
    added = torch.randn(outputs) if bias else None
    expected, out = torch.empty(rows, outputs), torch.empty(rows, outputs)
    whole(x, weight, added, expected)
    few_rows = FewRows()
    for _ in range(3):  # found out, and known
        out.fill_(float("nan"))
        few_rows.linear(x, weight, added, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_in_blocks_it_is_the_product(bias: bool) -> None:
    x, weight = torch.randn(8, 300, dtype=torch.float64), torch.randn(10 * BLOCK, 300, dtype=torch.float64).t()
    added = torch.randn(10 * BLOCK, dtype=torch.float64) if bias else None
    out, expected = torch.empty(2, 8, 10 * BLOCK, dtype=torch.float64)
    in_blocks(x, weight, added, out)
    whole(x, weight, added, expected)
    torch.testing.assert_close(out, expected)


def test_bits_that_are_not_torchs_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_little_wrong(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        in_blocks(x, weight, bias, out)
        out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(float("inf")))

    monkeypatch.setattr("gpu_worker.few_rows.in_blocks", a_little_wrong)
    x, weight = torch.randn(8, 64), torch.randn(64, 64).t()
    few_rows, out = FewRows(), torch.empty(8, 64)
    for _ in range(3):
        few_rows.linear(x, weight, None, out)
        assert torch.equal(out, torch.mm(x, weight))
