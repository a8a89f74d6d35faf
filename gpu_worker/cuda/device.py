"""The CUDA device: weights in its memory, calls staged through it, what the driver offers probed and told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.cuda.limbs import LimbProduct
from gpu_worker.cuda.memory import CudaMemory
from gpu_worker.cuda.pinning import Pinning
from gpu_worker.cuda.staging import Staging
from gpu_worker.cuda.streams import CudaStreams, Streams
from gpu_worker.device import CpuDevice, RingProduct
from shmbroker.arena import Cuda, CudaRuntime
from shmbroker.errors import BadInput, CudaRefused
from shmbroker.trust.quantization import IntegerWeight
from shmbroker.worker import DeviceMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class CudaDevice(CpuDevice):
    """Computes on a GPU: the same arithmetic, on staged tensors."""

    memory: DeviceMemory | None

    def __init__(
        self,
        device: torch.device,
        cuda: Cuda | None,
        why: str,
        streams: Streams,
        model: str,
        resident: Callable[[torch.Tensor], bool] | None = None,
    ) -> None:
        """``model``: the device's name; ``why`` there is no ``cuda``; ``resident``: whether a tensor is there, by its device where not given."""
        self._device = device
        pinning = Pinning(cuda, why)
        self.name = f"{device} {model}, {'pinned' if pinning.probe() else 'pageable'}"
        self.memory = CudaMemory(device, cuda, pinning, streams)
        self._staging = Staging(
            streams,
            lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device),
            resident or (lambda tensor: tensor.device == device),
        )

    def take(self, model: PreTrainedModel) -> None:
        """All its modules to the device."""
        model.to(self._device)  # type: ignore[arg-type]

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device."""
        return tensor.to(self._device)

    def ring_product(self, weight: IntegerWeight) -> RingProduct:
        """By the tensor cores, in limbs of 8 bits."""
        return LimbProduct(weight, self._device)

    def staged(self, function: Callable[..., Any], on_host: Collection[int] = ()) -> Callable[..., Any]:
        """Through staging memory."""
        return self._staging.staged(function, on_host)


def open_cuda(text: str) -> CudaDevice:
    """``cuda`` or ``cuda:1``. Raises :class:`BadInput` for one that is not there."""
    if not torch.cuda.is_available():
        raise BadInput(f"device {text!r}: this torch ({torch.__version__}) sees no CUDA device here; use --device cpu")
    index = int(text.partition(":")[2] or torch.cuda.current_device())
    if index >= torch.cuda.device_count():
        raise BadInput(f"device {text!r}: there are {torch.cuda.device_count()} CUDA devices here, numbered from 0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    cuda, why = _driver(index)
    return CudaDevice(device, cuda, why, CudaStreams(device), torch.cuda.get_device_name(device))


def _driver(index: int) -> tuple[Cuda | None, str]:
    try:
        return CudaRuntime(index), ""
    except CudaRefused as error:
        return None, str(error)
