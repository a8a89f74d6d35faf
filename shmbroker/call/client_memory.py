"""A client's memory: where its tensors are placed, in its segment and on a device, and which lie there already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from shmbroker.arena.arena import Arena
from shmbroker.arena.cuda_runtime import Cuda, CudaRuntime
from shmbroker.arena.device_arena import DeviceArena
from shmbroker.arena.spec import NUMPY_OF, check_dtype, shape_of
from shmbroker.call.plain_tensors import refuse_gradient, refuse_wrapped
from shmbroker.errors import BadInput, ChannelError, describe
from shmbroker.memory import layout
from shmbroker.memory.segment import Segment
from shmbroker.settings.sizes import parse_bytes


class ClientMemory:
    """The arena in a client's segment, and its device arena if it has one. Thread-safe.

    ``place_timeout``: seconds to wait for room in a full arena. After :meth:`close` its methods raise :class:`ChannelError`; tensors keep their memory.
    """

    def __init__(self, segment: Segment, place_timeout: float) -> None:
        self.segment = segment
        self.arena = Arena(segment)
        self.device: DeviceArena | None = None
        self.place_timeout = place_timeout
        self._parked: dict[str, list[object]] = {}
        """By worker: holds of blocks that it may still write to, though nobody waits for its answer any more."""
        self._closed = ""
        """Why, in words for its user."""

    @property
    def refused(self) -> str:
        """Why nothing can be placed any more, in words; empty while it can."""
        return self._closed

    def empty(
        self, shape: int | tuple[int, ...] | list[int], dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """As :meth:`Client.empty`."""
        self._check_open()
        arena: Arena | DeviceArena = self.arena if device == "cpu" else self._arena_on(device_of(device))
        check_dtype(dtype)
        return arena.empty(shape_of(shape), dtype, self.place_timeout)

    def device_arena(self, nbytes: int | str, device: str | torch.device = "cuda", *, cuda: Cuda | None = None) -> DeviceArena:
        """As :meth:`Client.device_arena`."""
        self._check_open()
        if self.device is not None:
            raise BadInput(f"this client has a device arena of {self.device.nbytes} bytes already: a client has one")
        size = layout.round_up(parse_bytes(nbytes), layout.PAGE)
        if not size > 0:
            raise BadInput("a device arena has at least one byte")
        self.device = DeviceArena(cuda or CudaRuntime.of(str(device_of(device))), size)
        return self.device

    def _arena_on(self, device: torch.device) -> Arena | DeviceArena:
        if device.type == "cpu":
            return self.arena
        if device.type != "cuda":
            raise BadInput(f"device {str(device)!r}: tensors lie on the cpu, or in the device arena (cuda)")
        if self.device is None:
            raise BadInput(f"client.empty(device={str(device)!r}) needs memory there: call client.device_arena(nbytes) first")
        return self.device

    def copy_in(self, tensor: Any) -> torch.Tensor:
        """As :meth:`Client.copy_in`."""
        self._check_open()
        outside = as_tensor(tensor)
        refuse_gradient("copy_in: the tensor", outside)
        refuse_wrapped("copy_in: the tensor", outside)
        return self.arena.copy_in(outside, self.place_timeout)

    def holds(self, tensor: object) -> bool:
        """As :meth:`Client.holds`."""
        try:
            found = as_tensor(tensor)
        except BadInput:
            return False
        return self.arena.find(found) is not None or (self.device is not None and self.device.find(found) is not None)

    def device_written(self) -> None:
        """Wait until what was written to the device arena on the current stream is there, for a worker to read."""
        if self.device is not None:
            self.device.written()

    def park(self, worker: str, holds: Iterable[object]) -> None:
        """Keep blocks from being placed anew until :meth:`unpark`: ``worker`` may still run calls that name them."""
        self._parked.setdefault(worker, []).extend(holds)

    def unpark(self, worker: str) -> None:
        """``worker`` is gone."""
        self._parked.pop(worker, None)

    def refuse(self, why: str) -> None:
        """From now on methods raise :class:`ChannelError` with ``why``, the first that was told."""
        self._closed = self._closed or why

    def close(self, why: str) -> None:
        """:meth:`refuse`, and let go of both arenas, once no channel uses them. Living tensors keep their memory."""
        self.refuse(why)
        if self.device is not None:
            self.device.close()
        self.arena.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelError(self._closed)


def device_of(device: object) -> torch.device:
    """A device as torch has it, of a text or as it is. Raises :class:`BadInput` for anything else."""
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise BadInput(f"device {device!r} is a {type(device).__name__}: give 'cpu', 'cuda' or a torch.device, e.g. tensor.device")
    try:
        return torch.device(device)
    except RuntimeError:
        raise BadInput(f"device {device!r} is not known: give 'cpu', 'cuda' or a torch.device, e.g. tensor.device") from None


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor or array as a tensor: the same memory where torch can take the array as it is, else a copy. Raises :class:`BadInput` for anything else.

    Arrays are NumPy's, whatever else offers DLPack (``__dlpack__``: JAX, CuPy, TVM, ...), and what NumPy makes an array of (``__array__``).
    """
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__dlpack__") and not isinstance(value, (np.ndarray, np.generic)):
        return _by_dlpack(value)
    if not hasattr(value, "__array__"):
        raise BadInput(f"a {type(value).__name__} cannot be handed over: give a torch tensor, a NumPy array, or one that offers DLPack")
    if isinstance(value, np.ma.MaskedArray):
        raise BadInput("a masked array cannot be handed over, since its mask would be lost: give array.filled(value), or array.data")
    try:
        return torch.from_numpy(_as_torch_takes_it(np.asarray(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"a {type(value).__name__} cannot be handed over as a tensor: {error}") from None


def _by_dlpack(value: Any) -> torch.Tensor:
    """The same memory, wherever it lies."""
    try:
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
    except Exception as error:  # whatever another library raises
        if hasattr(value, "__array__"):
            return as_tensor(np.asarray(value))
        raise BadInput(f"a {type(value).__name__} cannot be handed over by DLPack: {describe(error)}") from None
    check_dtype(tensor.dtype)
    return tensor


def _as_torch_takes_it(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``array`` itself, or a copy where its elements are swapped, or its strides are none of torch's: negative, or of no whole elements."""
    if array.dtype not in _CARRIED:
        raise BadInput(f"a NumPy array of {array.dtype} cannot be handed over; carried are: {', '.join(map(str, NUMPY_OF.values()))}")
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        return array.copy()
    return array


_CARRIED = {*NUMPY_OF.values(), *[dtype.newbyteorder("S") for dtype in NUMPY_OF.values()]}
"""What torch and a frame have of NumPy's dtypes, in either byte order."""
