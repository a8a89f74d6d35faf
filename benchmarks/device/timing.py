"""How long something takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP_CALLS = 3
AT_LEAST = 5


def median_seconds(call: Callable[[], object], seconds: float, warm_up: int = WARM_UP_CALLS, at_least: int = AT_LEAST) -> float:
    """Of calls for about ``seconds``. Each must itself wait for the device."""
    for _ in range(warm_up):
        call()
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(samples) < at_least:
        begun = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
