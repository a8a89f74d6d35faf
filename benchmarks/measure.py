"""Measuring: cases in turn, so that a machine whose speed drifts drifts for all of them alike; medians and ratios, never single figures."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

WARM_UP_CALLS = 20
TURN_SECONDS = 0.05
"""One case runs for so long, then the next: short against the drift of a shared machine, long against the cost of changing over."""


class Call:
    """One round trip. ``busy`` is the pid of a peer that spins without end, to be stopped while others are measured."""

    def __init__(self, call: Callable[[], object], busy: int = 0) -> None:
        self._call = call
        self.busy = busy

    def __call__(self) -> object:
        """Do it."""
        return self._call()

    def turn(self, seconds: float) -> list[int]:
        """Do it for so long, once at least: how long each took, in nanoseconds."""
        call, samples = self._call, []
        begun = time.perf_counter()
        while True:
            before = time.perf_counter_ns()
            call()
            samples.append(time.perf_counter_ns() - before)
            if time.perf_counter() - begun >= seconds:
                return samples


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
                case.samples_ns += case.call.turn(TURN_SECONDS)
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
