"""Specs of tensors: how far strided elements reach, and what is contiguous."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.arena.spec import TensorSpec, contiguous_strides, extent_elements
from shmbroker.errors import BadInput
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


@pytest.mark.parametrize(
    "shape", [3, np.int64(3), (np.int32(3),), [3], np.array([3]), torch.Size([3]), iter((3,))], ids=lambda value: type(value).__name__
)
def test_a_shape_is_a_whole_number_or_some_of_them_also_of_numpy(shape: Any) -> None:
    spec = TensorSpec(shape, torch.float32)
    assert spec.shape == (3,)
    assert type(spec.shape[0]) is int


@pytest.mark.parametrize("shape", ["3", 2.5, (2.5,), ("3",), None, [None], b"3", object()], ids=lambda value: type(value).__name__)
def test_what_is_no_shape_is_refused_with_an_example(shape: Any) -> None:
    with pytest.raises(BadInput, match=r"shape .* cannot be used: give a whole number or a tuple of them, e\.g\. \(2, 3\)$"):
        TensorSpec(shape, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("float32", r"is a str: give torch\.float32$"),
        ("torch.int8", r"is a str: give torch\.int8$"),
        (np.float64, r"is a type: give torch\.float64$"),
        (np.dtype("u2"), r"give torch\.uint16$"),
        (float, r"give a dtype of torch, e\.g\. torch\.float32$"),
        (None, r"is a NoneType: give a dtype of torch"),
        ([], r"is a list: give a dtype of torch"),
    ],
    ids=repr,
)
def test_what_is_no_dtype_of_torch_is_refused_with_the_one_that_is_meant(dtype: Any, wanted: str) -> None:
    with pytest.raises(BadInput, match=wanted):
        TensorSpec((1,), dtype)
