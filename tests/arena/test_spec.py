"""Specs of tensors: how far strided elements reach, and what is contiguous."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.arena.spec import contiguous_strides, extent_elements
from tests.tensors import Tensor, reach, tensors


@settings(deadline=None)
@given(tensors())
def test_the_extent_of_a_strided_tensor_is_where_its_last_element_ends(tensor: Tensor) -> None:
    spec, strides = tensor
    extent = extent_elements(spec.shape, strides)
    assert extent == reach(spec.shape, strides)
    indices = torch.arange(max(extent, 1)).as_strided(spec.shape, strides)
    assert extent == (int(indices.max()) + 1 if indices.numel() else 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8))
def test_contiguous_strides_are_those_of_torch(shape: list[int]) -> None:
    assert contiguous_strides(tuple(shape)) == torch.empty(shape).stride()
