"""Shape and dtype of a tensor without its values, and how dtypes are written in descriptors."""

from __future__ import annotations

import contextlib
import math
import operator
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
    torch.uint16: DTypeCode.UINT16,
    torch.uint32: DTypeCode.UINT32,
    torch.uint64: DTypeCode.UINT64,
    torch.complex64: DTypeCode.COMPLEX64,
    torch.complex128: DTypeCode.COMPLEX128,
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
    torch.uint16: np.dtype(np.uint16),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
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

    def __init__(self, shape: int | Iterable[int], dtype: torch.dtype) -> None:
        object.__setattr__(self, "shape", shape_of(shape))
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


def shape_of(shape: int | Iterable[int]) -> tuple[int, ...]:
    """A shape as whole numbers of Python; one number is one dimension. NumPy's integers are taken too. Raises :class:`BadInput`."""
    if not isinstance(shape, (tuple, str, bytes)):
        with contextlib.suppress(TypeError):
            return (operator.index(shape),)  # type: ignore[arg-type]
    if not isinstance(shape, (str, bytes)):
        with contextlib.suppress(TypeError):
            return tuple([operator.index(size) for size in shape])  # type: ignore[union-attr]
    raise BadInput(f"shape {shape!r} cannot be used: give a whole number or a tuple of them, e.g. (2, 3)")


def check_dtype(dtype: object) -> None:
    """Raise :class:`BadInput` for what is no dtype of torch, or one that no frame carries."""
    if not isinstance(dtype, torch.dtype):
        name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
        name = str(name).removeprefix("torch.")
        wanted = f"torch.{name}" if name in DTYPE_NAMED else "a dtype of torch, e.g. torch.float32"
        raise BadInput(f"dtype {dtype!r} is a {type(dtype).__name__}: give {wanted}")
    if dtype not in CODE_OF:
        raise BadInput(f"{dtype} cannot be handed over; carried are: {', '.join(DTYPE_NAMED)}")


def check_carried(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`BadInput` when a frame cannot carry such a tensor."""
    check_dtype(dtype)
    if len(shape) > MAX_DIMS:
        raise BadInput(f"a tensor of {len(shape)} dimensions cannot be handed over; at most {MAX_DIMS}: flatten some")
    if not all(size >= 0 for size in shape):
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
