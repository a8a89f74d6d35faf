"""Digests of weights: the same for the same values, another for any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.models.digests import digest_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (300, 301), (16384,), (4, 16384)])
def test_equal_tensors_have_one_digest_however_they_lie(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)
    digest = digest_of(tensor)
    assert digest == digest_of(tensor.clone())
    shifted = torch.empty(tensor.numel() + 1, dtype=dtype)[1:].view(shape).copy_(tensor)
    assert digest == digest_of(shifted)
    if len(shape) == 2:
        assert digest == digest_of(tensor.t().contiguous().t())
        assert shape[0] == shape[1] or digest != digest_of(tensor.t())
    assert digest != digest_of(tensor.to(torch.float64))


@given(st.integers(0, 70_000 - 1), st.integers(0, 31))
def test_one_bit_makes_another_digest(place: int, bit: int) -> None:
    tensor = torch.arange(70_000, dtype=torch.int32)
    digest = digest_of(tensor)
    tensor[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert digest_of(tensor) != digest


def test_two_values_that_change_places_are_seen() -> None:
    tensor = torch.randn(10_000)
    other = tensor.clone()
    other[17], other[8_001] = tensor[8_001], tensor[17]
    assert digest_of(tensor) != digest_of(other)
