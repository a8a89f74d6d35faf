"""The worker that is shared: a layer's products on one core, ``pieces`` or ``whole``. A peer (:mod:`benchmarks.peer`)."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import shmbroker
from benchmarks.peer import be_peer, ready
from benchmarks.sharing.layer import PRODUCTS, SERVICE
from gpu_worker.device import CpuDevice
from gpu_worker.ops import Linear
from shmbroker import TensorSpec


def serve(kind: str) -> None:
    """``pieces``: as ``gpu-worker`` computes them; ``whole``: each product is one piece."""
    torch.set_num_threads(1)
    worker = shmbroker.Worker(SERVICE)
    weights = {name: torch.randn(outputs, inputs).t() for name, (inputs, outputs) in PRODUCTS.items()}

    def spec(x: TensorSpec, module: str) -> TensorSpec:
        return TensorSpec((*x.shape[:-1], PRODUCTS[module][1]), x.dtype)

    @worker.bound_op(out_spec=spec)
    def linear(module: str) -> Callable[..., None]:
        product = Linear(CpuDevice(), [(weights[module], None)], PRODUCTS[module][0])
        return product if kind == "pieces" else lambda x, *, out: product(x, out=out)

    worker.serve(ready)


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
