"""The boundary to the CUDA driver: the few of its functions that shmbroker calls itself. All else goes through torch.

Errors are cleared where they arise: the runtime would otherwise report them once more, to whoever asks next. ``cuda-bindings`` (the extra
``cuda``) has a runtime of its own, so that torch's never meets them; both work in the device's one primary context.
"""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any, Protocol

import torch

from shmbroker.errors import BadInput, CudaRefused

HANDLE_BYTES = 64
"""Of an IPC handle."""

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all contexts. Also cudaIpcMemLazyEnablePeerAccess, the only flag of opening."""


class Cuda(Protocol):
    """What is asked of the driver, for one device. Every method raises :class:`CudaRefused`."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory."""

    def unregister(self, address: int) -> None:
        """Unpin what was registered at ``address``."""

    def allocate(self, nbytes: int) -> int:
        """An allocation of its own on the device: its address."""

    def free(self, pointer: int) -> None:
        """Give it back."""

    def export(self, pointer: int) -> bytes:
        """The handle by which another process opens the allocation."""

    def open(self, handle: bytes) -> int:
        """Another process's allocation: its address here."""

    def close(self, pointer: int) -> None:
        """Close what was opened."""

    def size(self, pointer: int) -> int:
        """Bytes of the allocation that begins at ``pointer``."""

    def tensor(self, pointer: int, nbytes: int, owner: object) -> tuple[torch.Tensor, object]:
        """Bytes at ``pointer`` as a tensor, and the object that lives exactly as long as its storage; ``owner`` lives as long too."""

    def synchronize(self) -> None:
        """Wait for all work of the current stream."""


class _Memory:
    """Device memory as torch takes it over; its storage keeps this object."""

    __slots__ = ("__cuda_array_interface__", "__weakref__", "_owner")

    def __init__(self, pointer: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 2: without a stream, for we synchronise ourselves.
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 2}


class CudaRuntime:
    """The driver through ``cuda-bindings``, for device ``index``. Raises :class:`CudaRefused` where that cannot be had."""

    def __init__(self, index: int) -> None:
        self._runtime = _bindings("runtime")
        self._index = index

    @classmethod
    def of(cls, device: str) -> CudaRuntime:
        """For ``cuda`` or ``cuda:1``. Raises :class:`BadInput` for what is not there."""
        if not torch.cuda.is_available():
            raise BadInput(f"device {device!r}: this torch ({torch.__version__}) sees no CUDA device here")
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise BadInput(f"device {device!r} is not known: {error}") from None
        if chosen.type != "cuda":
            raise BadInput(f"device {device!r}: a device arena lies on cuda, or cuda:N")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise BadInput(f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices here")
        return cls(index)

    def _ask(self, function: str, *arguments: Any) -> Any:
        runtime = self._runtime
        runtime.cudaSetDevice(self._index)
        error, *results = getattr(runtime, function)(*arguments)
        if int(error):
            runtime.cudaGetLastError()
            raise CudaRefused(f"{function}: {error.name} ({int(error)})", int(error))
        return results[0] if results else None

    def register(self, address: int, nbytes: int) -> None:
        """See :class:`Cuda`."""
        self._ask("cudaHostRegister", address, nbytes, PORTABLE)

    def unregister(self, address: int) -> None:
        """See :class:`Cuda`."""
        self._ask("cudaHostUnregister", address)

    def allocate(self, nbytes: int) -> int:
        """See :class:`Cuda`."""
        return int(self._ask("cudaMalloc", nbytes))

    def free(self, pointer: int) -> None:
        """See :class:`Cuda`."""
        self._ask("cudaFree", pointer)

    def export(self, pointer: int) -> bytes:
        """See :class:`Cuda`."""
        handle = self._ask("cudaIpcGetMemHandle", pointer)
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        """See :class:`Cuda`."""
        if len(handle) != HANDLE_BYTES:
            raise CudaRefused(f"an IPC handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        told = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(told.getPtr(), handle, HANDLE_BYTES)
        return int(self._ask("cudaIpcOpenMemHandle", told, PORTABLE))

    def close(self, pointer: int) -> None:
        """See :class:`Cuda`."""
        self._ask("cudaIpcCloseMemHandle", pointer)

    def size(self, pointer: int) -> int:
        """See :class:`Cuda`."""
        try:
            error, _, nbytes = _bindings("driver").cuMemGetAddressRange(pointer)
        except RuntimeError as missing:  # of the bindings, which look for the driver only now
            raise CudaRefused(f"cuMemGetAddressRange: {missing}") from None
        if int(error):
            raise CudaRefused(f"cuMemGetAddressRange: {error.name} ({int(error)})", int(error))
        return int(nbytes)

    def tensor(self, pointer: int, nbytes: int, owner: object) -> tuple[torch.Tensor, object]:
        """See :class:`Cuda`."""
        memory = _Memory(pointer, nbytes, owner)
        flat = torch.as_tensor(memory, device=torch.device("cuda", self._index))
        if nbytes and flat.data_ptr() != pointer:  # torch copies, without a word, what it takes to be elsewhere
            raise CudaRefused(f"device memory at {pointer:#x} was taken over as a copy, not as it is on cuda:{self._index}")
        return flat, memory

    def synchronize(self) -> None:
        """See :class:`Cuda`."""
        torch.cuda.current_stream(self._index).synchronize()


def _bindings(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except (ImportError, RuntimeError) as error:
        raise CudaRefused(f"cuda-bindings cannot be used ({error}): pip install 'shmbroker[cuda]'") from None
