"""A GPU worker whose driver is a stand-in: all of the CUDA device's own code, on a machine without one. ``device_worker.py FOLDER SERVICE [MODEL]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import shmbroker
from gpu_worker import serve
from gpu_worker.cuda.device import CudaDevice
from shmbroker import TensorSpec

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.gpu_worker.fake_cuda import FakeCuda, FakeStreams

folder, service, *model = sys.argv[1:]
refuse = {name: 801 for name in os.environ.get("REFUSE", "").split(",") if name}
cuda = FakeCuda(Path(folder), refuse)
streams = FakeStreams(float(os.environ.get("EVENT_SECONDS", "0.001")), os.environ.get("EVENT_FAILS", ""))
device = CudaDevice(torch.device("cpu"), cuda, "", streams, "Stand-in", cuda.holds)

if model:
    serve.open_device = lambda text: device
    serve.serve(
        model=model[0], shape=None, seed=0, device="cuda", dtype="float32", service=service, instance=None, name=None, threads=1, spin=0.0,
        until_exit=0, trace=None,
    )  # fmt: skip
    sys.exit()

worker = shmbroker.Worker(service, device=device.name, memory=device.memory)


def double(x: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.mul(x, 2, out=out)


def fail(x: torch.Tensor, *, out: torch.Tensor) -> None:
    raise ValueError("no such luck")


for op in (double, fail):
    worker.op(op.__name__, out_spec=lambda x: TensorSpec(x.shape, x.dtype))(device.staged(op))


@worker.op(out_spec=lambda x: TensorSpec((2,), torch.int64))
def books(x: torch.Tensor, *, out: torch.Tensor) -> None:
    """Segments registered now, allocations open now."""
    out.copy_(torch.tensor([len(cuda.registered), len(cuda.mapped)]))


worker.serve(ready=lambda: print("ready", flush=True))
