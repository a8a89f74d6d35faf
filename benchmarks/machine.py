"""The machine that is measured on: what it is, and the cores and the CPU time that a process has of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

PEER_CPU = 1
"""Client and peer have a core each, as two workers on one machine would have: left to itself, a scheduler now puts both on one core, where a
semaphore costs 5 us, now on two, where it costs 46, and figures of one run cannot be compared."""


def pin(cpu: int) -> None:
    """Keep this process on one core, where there are several."""
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {cpu})


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far, in the kernel's ticks (usually 0.01 s)."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
