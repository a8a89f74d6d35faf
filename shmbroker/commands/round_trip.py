"""A measured round trip: calls of the op that every worker has, one after the other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from shmbroker.client.channel import Channel

WARM_UP_CALLS = 20

ELEMENTS = 64
"""float32, of the tensor that is sent where no size is told: it costs nothing, which leaves what a call costs."""


class RoundTrip(msgspec.Struct, frozen=True):
    """What ``calls`` calls took, in microseconds each, from the call until its output was there."""

    calls: int
    nbytes: int
    """Of the tensor, each way."""
    min_us: float
    median_us: float
    p99_us: float
    max_us: float


def measure(channel: Channel, calls: int, elements: int = ELEMENTS) -> RoundTrip:
    """Send a float32 tensor of ``elements`` that lies in the arena, and wait for its copy, ``calls`` times.

    Raises :class:`BadInput` where the worker has no such op (it is of another release), and whatever a call does.
    """
    from shmbroker.call.report import percentile
    from shmbroker.worker.built_in_ops import ECHO

    echo = channel.bind(ECHO)
    x = channel.memory.empty((elements,)).fill_(1.0)
    for _ in range(WARM_UP_CALLS):
        echo(x)
    taken = []
    for _ in range(calls):
        begun = time.perf_counter_ns()
        echo(x)
        taken.append(time.perf_counter_ns() - begun)
    taken.sort()
    least, median, p99, most = (round(value / 1e3, 1) for value in (taken[0], percentile(taken, 0.5), percentile(taken, 0.99), taken[-1]))
    return RoundTrip(calls, x.nbytes, least, median, p99, most)
