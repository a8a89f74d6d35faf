"""What a block must hold: shape and dtype of a tensor, and all that follows from them."""

from __future__ import annotations

import functools
import math
import struct

import torch

from shmbroker.arena.spec import NUMPY_OF, check_carried, shape_of
from shmbroker.memory.layout import ALIGNMENT, MAX_DIMS, round_up

_FORM = struct.Struct(f"<BBHi{MAX_DIMS}q")
"""As ``_leases.c`` reads it: code and bits of the dtype in DLPack, dimensions, shape."""

_DLPACK_CODES = {
    torch.int8: 0,
    torch.int16: 0,
    torch.int32: 0,
    torch.int64: 0,
    torch.uint8: 1,
    torch.float16: 2,
    torch.float32: 2,
    torch.float64: 2,
    torch.bfloat16: 4,
    torch.bool: 6,
    torch.complex64: 5,
    torch.complex128: 5,
}
_INTEGER_CODE = _DLPACK_CODES[torch.int8]
"""What torch releases do not all know in DLPack (float8, uint16 and wider) is made as integers of its width, and then seen as what it is."""


class Room:
    """Shape and dtype of a tensor that is to be placed. Raises :class:`BadInput` for what is not carried."""

    __slots__ = ("as_integers", "count", "dtype", "form", "nbytes", "numpy_dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape = shape_of(shape)
        check_carried(shape, dtype)
        self.dtype = dtype
        self.count = math.prod(shape)
        self.nbytes = round_up(self.count * dtype.itemsize or 1, ALIGNMENT)
        self.numpy_dtype = NUMPY_OF.get(dtype)
        """Tensors are made from arrays where NumPy has the dtype: half the time of the way through ``torch.frombuffer``."""
        self.as_integers = dtype not in _DLPACK_CODES
        code = _DLPACK_CODES.get(dtype, _INTEGER_CODE)
        self.form = _FORM.pack(code, dtype.itemsize * 8, 0, len(shape), *shape, *(0,) * (MAX_DIMS - len(shape)))


@functools.lru_cache(maxsize=1024)
def room_for(shape: tuple[int, ...], dtype: torch.dtype) -> Room:
    """The same, remembered: programs ask for the same few shapes again and again."""
    return Room(shape, dtype)
