"""A worker of plain ops on ``cuda:0``, for tests and benchmarks. ``cuda_worker.py SERVICE``; $PAGEABLE=1 has the driver refuse to pin."""

from __future__ import annotations

import os
import sys

import torch

import shmbroker
from gpu_worker.cuda.device import open_cuda
from shmbroker import TensorSpec
from shmbroker.arena.cuda_runtime import CudaRuntime
from shmbroker.errors import CudaRefused


def refuse(self: CudaRuntime, address: int, nbytes: int) -> None:
    raise CudaRefused("cudaHostRegister: cudaErrorNotSupported (801), as this test wants it", 801)


if os.environ.get("PAGEABLE"):
    CudaRuntime.register = refuse  # type: ignore[method-assign]

device = open_cuda("cuda:0")
worker = shmbroker.Worker(sys.argv[1], device=device.name, memory=device.memory)


def double(x: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.mul(x, 2, out=out)


worker.op("double", out_spec=lambda x: TensorSpec(x.shape, x.dtype))(device.staged(double))
with torch.no_grad():
    worker.serve(ready=lambda: print("ready", flush=True))
