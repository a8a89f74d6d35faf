"""Measuring: cases in turn, so that a machine whose speed drifts drifts for all of them alike; medians and ratios, never single figures."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.contenders import Call

WARM_UP_CALLS = 20
TURN_SECONDS = 0.05
"""One case runs for so long, then the next: short against the drift of a shared machine, long against the cost of changing over."""


PEER_CPU = 1
"""Client and peer have a core each, as two workers on one machine would have: left to itself, a scheduler now puts both on one core, where a
semaphore costs 5 us, now on two, where it costs 46, and figures of one run cannot be compared."""


def pin(cpu: int) -> None:
    """Keep this process on one core, where there are several."""
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {cpu})


@dataclass(slots=True)
class Case:
    """One side of a comparison. ``call`` does one round trip."""

    name: str
    call: Call
    samples_ns: list[int] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        """Microseconds."""
        return statistics.median(self.samples_ns) / 1e3

    @property
    def p99_us(self) -> float:
        """Microseconds."""
        return sorted(self.samples_ns)[max(0, int(len(self.samples_ns) * 0.99) - 1)] / 1e3


def alternate(cases: Sequence[Case], seconds: float, at_least: int = 5) -> None:
    """Run each case for about ``seconds`` in all and at least ``at_least`` calls, turn by turn."""
    for case in cases:
        with _alone(case):
            for _ in range(WARM_UP_CALLS):
                case.call()
    spent = dict.fromkeys((case.name for case in cases), 0.0)
    while any(spent[case.name] < seconds or len(case.samples_ns) < at_least for case in cases):
        for case in cases:
            with _alone(case):
                begun = time.perf_counter()
                while time.perf_counter() - begun < TURN_SECONDS:
                    before = time.perf_counter_ns()
                    case.call()
                    case.samples_ns.append(time.perf_counter_ns() - before)
                spent[case.name] += time.perf_counter() - begun


@contextlib.contextmanager
def _alone(case: Case) -> Iterator[None]:
    """Let a peer that spins without end run only in its own turns: it would have a core of the others' otherwise."""
    busy = case.call.busy
    if busy:
        os.kill(busy, signal.SIGCONT)
    try:
        yield
    finally:
        if busy:
            os.kill(busy, signal.SIGSTOP)


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


def size_text(nbytes: int) -> str:
    """``8 MiB``."""
    for unit, power in (("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return f"{nbytes >> power} {unit}"
    return f"{nbytes} B"
