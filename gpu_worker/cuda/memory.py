"""A CUDA device's memory, as a worker asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from gpu_worker.cuda.pinning import Pinning
from gpu_worker.cuda.streams import StreamKind, Streams
from shmbroker.arena import Cuda, TensorSpec
from shmbroker.errors import BadInput, CudaRefused

log = logging.getLogger(__name__)


class CudaMemory:
    """What a worker asks of the device's memory. ``cuda``: None where only torch can be asked."""

    asynchronous = True

    def __init__(self, device: torch.device, cuda: Cuda | None, pinning: Pinning, streams: Streams) -> None:
        self._device = device
        self._cuda = cuda
        self._pinning = pinning
        self._streams = streams

    def map(self, address: int, nbytes: int) -> Callable[[], None]:
        """Pin the segment, where that can be had."""
        return self._pinning.pin(address, nbytes)

    def empty(self, spec: TensorSpec) -> torch.Tensor:
        """In the device's memory, for the stream that computes."""
        with self._streams.on(StreamKind.COMPUTE):
            return torch.empty(spec.shape, dtype=spec.dtype, device=self._device)

    def open_arena(self, handle: bytes, nbytes: int) -> tuple[torch.Tensor, Callable[[], None]]:
        """By CUDA IPC. What the client tells of its size is compared with the driver's word."""
        cuda = self._cuda
        if cuda is None:
            raise CudaRefused("this worker has no cuda-bindings, and so no CUDA IPC: pip install 'shmbroker[cuda]'")
        pointer = cuda.open(handle)

        def close() -> None:
            try:
                cuda.close(pointer)
            except CudaRefused as error:
                log.warning("closing a device arena: %s", error)

        try:
            true = cuda.size(pointer)
            if true < nbytes:
                raise BadInput(f"the device arena is said to have {nbytes} bytes; its allocation has {true}")
            flat = cuda.tensor(pointer, nbytes, None)[0]
        except BaseException:
            close()
            raise
        log.info("device arena of %d bytes opened by CUDA IPC", nbytes)
        return flat, close
