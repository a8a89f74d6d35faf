"""Copies between a device and the arena, registered with the driver, against torch's own pinned memory and pageable memory."""

from __future__ import annotations

from typing import Any

import torch

import shmbroker
from benchmarks.device.timing import median_seconds, synchronize
from benchmarks.table import Table, size_text
from gpu_worker.serve import open_device
from shmbroker.worker.device_memory import HostMemory

SIZES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)


def copies(device: str, seconds: float) -> dict[str, Any]:
    """GiB/s by size, way and kind of memory; ``seconds`` for each."""
    memory = open_device(device).memory or HostMemory()
    table = Table(f"copies to and from {device}", ["size", "memory", "up GiB/s", "down GiB/s"])
    result: dict[str, Any] = {}
    with shmbroker.local_broker(), shmbroker.connect(arena=256 << 20) as client:
        block = client.empty((SIZES[-1],), torch.uint8)
        unpin = memory.map(block.data_ptr(), block.nbytes)
        for nbytes in SIZES:
            sides = {"arena": block[:nbytes].fill_(1), "pageable": torch.ones(nbytes, dtype=torch.uint8)}
            if device.startswith("cuda"):
                sides["pinned"] = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
            result[str(nbytes)] = {}
            for name, here in sides.items():
                there = torch.empty(nbytes, dtype=torch.uint8, device=device)
                up, down = (_rate(device, *ends, seconds) for ends in ((there, here), (here, there)))
                table.row(size_text(nbytes), name, f"{up:.1f}", f"{down:.1f}")
                result[str(nbytes)][name] = {"up_gib_per_second": up, "down_gib_per_second": down}
        synchronize(device)
        unpin()
    table.show()
    return result


def _rate(device: str, target: torch.Tensor, source: torch.Tensor, seconds: float) -> float:
    """GiB/s."""

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        synchronize(device)

    return source.nbytes / median_seconds(copy, seconds) / 2**30
