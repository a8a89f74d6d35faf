"""Round trips of 8 MiB to a worker that doubles it on its device: over shared memory and the bus twice, and in the device arena."""

from __future__ import annotations

import sys
from functools import partial

import click
import torch

import shmbroker
from benchmarks.device.timing import median_seconds
from benchmarks.peer import be_peer, peer, ready
from benchmarks.table import Table, size_text
from gpu_worker.serve import open_device
from shmbroker.errors import ShmBrokerError

NBYTES = 8 << 20


def round_trips(device: str, seconds: float) -> dict[str, float]:
    """Microseconds by where the tensors lie."""
    table = Table(f"round trip of {size_text(NBYTES)}, worker on {device}", ["tensors lie in", "us"])
    result: dict[str, float] = {}
    with shmbroker.local_broker(), peer("device.round_trips", device), shmbroker.connect(arena=256 << 20) as client:
        double = client.channel("double").bind("double")
        shape = (NBYTES // 4,)
        inputs = {"shared memory": client.empty(shape).fill_(1.0)}
        try:
            client.device_arena(256 << 20)
            inputs["device arena (CUDA IPC)"] = client.empty(shape, device="cuda").fill_(1.0)
        except ShmBrokerError as error:
            click.echo(f"no device arena: {error}")
        for name, x in inputs.items():
            result[name] = median_seconds(partial(double, x), seconds) * 1e6
            table.row(name, f"{result[name]:.1f}")
        inputs.clear()
    table.show()
    return result


def serve(device: str) -> None:
    """The worker."""
    target = open_device(device)
    worker = shmbroker.Worker("double", device=target.name, memory=target.memory)

    def double(x: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.mul(x, 2, out=out)

    worker.op("double", out_spec=lambda x: shmbroker.TensorSpec(x.shape, x.dtype))(target.staged(double))
    with torch.no_grad():
        worker.serve(ready)


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
