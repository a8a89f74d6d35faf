"""The worker that decodes for many: some layers' products on one core, ``alone`` or ``together``. A peer (:mod:`benchmarks.peer`)."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import shmbroker
from benchmarks.batching.layers import PRODUCTS, SERVICE, names
from benchmarks.peer import be_peer, ready
from gpu_worker.device import CpuDevice
from gpu_worker.ops import Linear
from shmbroker import TensorSpec


def serve(kind: str, layers: str) -> None:
    """``together``: with ``batch="user"``."""
    torch.set_num_threads(1)
    worker = shmbroker.Worker(SERVICE, batch="user" if kind == "together" else None)
    weights = {}
    for name, product in names(int(layers)):
        inputs, outputs = PRODUCTS[product]
        weights[name] = torch.randn(outputs, inputs).t()

    def spec(x: TensorSpec, module: str) -> TensorSpec:
        return TensorSpec((*x.shape[:-1], weights[module].shape[1]), x.dtype)

    @worker.bound_op(out_spec=spec, row_wise=True)
    def linear(module: str) -> Callable[..., None]:
        return Linear(CpuDevice(), [(weights[module], None)], weights[module].shape[0])

    worker.serve(ready)


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
