"""Where tensors lie: a ring allocator over a segment or a device, and the leases of its blocks."""

from shmbroker.arena.cuda_runtime import Cuda, CudaRuntime
from shmbroker.arena.spec import NAME_OF, TensorSpec

__all__ = ["NAME_OF", "Cuda", "CudaRuntime", "TensorSpec"]
