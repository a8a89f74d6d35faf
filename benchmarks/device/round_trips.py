"""Round trips to a worker that doubles a tensor on its device: over shared memory and the bus twice, in the device arena, and without a call."""

from __future__ import annotations

import sys
from functools import partial

import click
import torch

import shmbroker
from benchmarks.device.timing import median_seconds, synchronize
from benchmarks.peer import peer, ready
from benchmarks.split_model.processes import on_all_cores
from benchmarks.table import Table, size_text
from gpu_worker.serve import open_device
from shmbroker.errors import ShmBrokerError

SIZES = (64, 8 << 20)
ALONE = "on the device, no call"
SHARED, DEVICE_ARENA = "shared memory", "device arena (CUDA IPC)"


def round_trips(device: str, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds by size in bytes, and where the tensors lie."""
    table = Table(f"round trip, worker on {device}", ["size", "tensors lie in", "us"])
    result: dict[str, dict[str, float]] = {}
    with (
        on_all_cores(torch.get_num_threads()),  # the worker has a thread that launches, one that completes, and the driver's
        shmbroker.local_broker(),
        peer("device.round_trips", device),
        shmbroker.connect(arena=256 << 20) as client,
    ):
        double = client.channel("double").bind("double")
        try:
            client.device_arena(256 << 20)
            rooms = {SHARED: "cpu", DEVICE_ARENA: "cuda"}
        except ShmBrokerError as error:
            click.echo(f"no device arena: {error}")
            rooms = {SHARED: "cpu"}
        for nbytes in SIZES:
            rows = {ALONE: median_seconds(partial(_alone, torch.ones(nbytes // 4, device=device), device), seconds) * 1e6}
            for name, where in rooms.items():
                x = client.empty((nbytes // 4,), device=where).fill_(1.0)
                rows[name] = median_seconds(partial(double, x), seconds) * 1e6
                del x
            for name, microseconds in rows.items():
                table.row(size_text(nbytes), name, f"{microseconds:.1f}")
            result[str(nbytes)] = rows
    table.show()
    return result


def _alone(x: torch.Tensor, device: str) -> None:
    torch.mul(x, 2)
    synchronize(device)


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
    serve(*sys.argv[1:])
