"""``copies``: a tensor from outside the arena enters it at the speed of a plain copy."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import shmbroker
from benchmarks.measure import Call, Case, alternate
from benchmarks.table import Table, size_text

SIZES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure ``client.copy_in`` against ``torch.Tensor.copy_`` into a tensor that is there already. Microseconds."""
    result: dict[str, Any] = {}
    table = Table("entering the arena", ["size", "copy_in us", "copy_ us", "speed of copy_"])
    with shmbroker.local_broker(), shmbroker.connect(arena=512 << 20) as client:
        for nbytes in SIZES:
            source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
            cases = [Case("copy_in", Call(partial(client.copy_in, source))), Case("copy_", Call(partial(target.copy_, source)))]
            alternate(cases, seconds / 2)
            ours, plain = (case.median_us for case in cases)
            table.row(size_text(nbytes), f"{ours:.1f}", f"{plain:.1f}", f"{plain / ours:.2f}")
            result[str(nbytes)] = {"copy_in_us": ours, "copy_us": plain, "speed": plain / ours}
    table.show()
    return result


def quick() -> dict[str, Any]:
    """A moment."""
    return run(0.1)
