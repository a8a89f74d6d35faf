"""Shape and dtype of a tensor without its values, and how dtypes are written in descriptors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shmbroker.errors import BadInput
from shmbroker.memory.layout import MAX_DIMS, DTypeCode

CODE_OF: dict[torch.dtype, DTypeCode] = {
    torch.float32: DTypeCode.FLOAT32,
    torch.float64: DTypeCode.FLOAT64,
    torch.float16: DTypeCode.FLOAT16,
    torch.bfloat16: DTypeCode.BFLOAT16,
    torch.int8: DTypeCode.INT8,
    torch.int16: DTypeCode.INT16,
    torch.int32: DTypeCode.INT32,
    torch.int64: DTypeCode.INT64,
    torch.uint8: DTypeCode.UINT8,
    torch.bool: DTypeCode.BOOL,
    torch.float8_e4m3fn: DTypeCode.FLOAT8_E4M3FN,
    torch.float8_e5m2: DTypeCode.FLOAT8_E5M2,
}
NUMPY_OF: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}
"""NumPy lacks bfloat16 and float8."""

DTYPE_OF: dict[int, torch.dtype] = {int(code): dtype for dtype, code in CODE_OF.items()}
NAME_OF: dict[torch.dtype, str] = {dtype: str(dtype).removeprefix("torch.") for dtype in CODE_OF}
DTYPE_NAMED: dict[str, torch.dtype] = {name: dtype for dtype, name in NAME_OF.items()}


def dtype_named(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``. Raises :class:`BadInput` with the names there are."""
    try:
        return DTYPE_NAMED[name]
    except KeyError:
        raise BadInput(f"dtype {name!r} is not carried; there are: {', '.join(DTYPE_NAMED)}") from None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor: what an op's ``out_spec`` takes and returns.

    ``shape``: elements a dimension, at most 8 dimensions. ``dtype``: one of the dtypes that a frame can carry.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, shape: Iterable[int], dtype: torch.dtype) -> None:
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "dtype", dtype)
        check_carried(self.shape, dtype)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{NAME_OF[self.dtype]}{list(self.shape)}"


def check_carried(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`BadInput` when a frame cannot carry such a tensor."""
    if dtype not in CODE_OF:
        raise BadInput(f"{dtype} cannot be handed over; carried are: {', '.join(DTYPE_NAMED)}")
    if len(shape) > MAX_DIMS:
        raise BadInput(f"a tensor of {len(shape)} dimensions cannot be handed over; at most {MAX_DIMS}: flatten some")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise BadInput(f"shape {list(shape)} cannot be used: dimensions are whole numbers, 0 or more")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise BadInput(f"shape {list(shape)} has more elements than can be counted")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of an existing tensor."""
    return TensorSpec(tensor.shape, tensor.dtype)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, elements."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def extent_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last that a strided tensor touches, both included; 0 for an empty tensor.

    Strides must not be negative (torch has none).
    """
    reach = 1
    for size, stride in zip(shape, strides, strict=True):
        if size == 0:
            return 0
        reach += (size - 1) * stride
    return reach
