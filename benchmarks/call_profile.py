"""What a call between two processes is made of, told by the calls themselves.

Client and worker stamp each call whichever way it is made, with one clock (CLOCK_MONOTONIC), and count what lies between: that is read before and after a
call, so nothing is added to what is measured. A stage takes in all there is between its stamps: of one C function no step can be run alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.contenders import ours
from shmbroker.call.captured_call import CapturedCall
from shmbroker.call.remote_op import RemoteOp
from shmbroker.call.statistics import OpStatistics
from shmbroker.client.channel import Channel

Stages = dict[str, float]
"""Nanoseconds by what is done in them, in order; the last is the whole call, and not their sum: each is a median of its own."""

STAGES = (
    "client: until the frame is written",
    "frame on its way, seen by the worker",
    "worker: recognise it, run nothing",
    "completion on its way, read",
    "client: count, let go",
)
"""In order: the inputs are looked at, the plan found, the outputs placed. The call is registered, the frame written, published and seen, and meanwhile the
client makes its outputs' tensors. The frame is copied and recognised, and an op run that does nothing. The worker looks whether that left its inputs as they
were, writes and publishes the completion, and the client reads it. It counts, lets go of the call, and whoever called lets go of the outputs; with Python's
own way in and out."""

WHOLE = "the whole call"

WAYS = {"called": "called", "replayed": "replayed", "called by Python": "in Python", "replayed by Python": "and replayed"}
"""With the heads of their columns. The last two: as the first two are where they are not ordinary, or where there are no compiled calls."""

FURTHER = ("with a second input", "with a second output")
"""What one more costs: the difference of two whole calls, so a disturbance of the one makes it less."""

WARM_UP_CALLS = 100


def profiles(calls: int, nbytes: int) -> tuple[dict[str, Stages], dict[str, float], int]:
    """The stages of each way, the cost of what is :data:`FURTHER`, and how many of the calls were compiled. All in turns, ``calls`` of each."""
    with ours.channels(nbytes) as (client, channel):
        x, y = (client.empty((nbytes,), torch.uint8).fill_(1) for _ in range(2))
        echo, both, two = (_bound(channel, name) for name in ("echo", "two_inputs", "two_outputs"))
        captured = echo.op.capture(x)
        ways: dict[str, tuple[_Bound, Callable[[], object]]] = {
            "called": (echo, lambda: echo.op(x)),
            "replayed": (echo, captured.replay),
            "called by Python": (echo, lambda: RemoteOp.__call__(echo.op, x)),
            "replayed by Python": (echo, lambda: CapturedCall.replay(captured)),
            FURTHER[0]: (both, lambda: both.op(x, y)),
            FURTHER[1]: (two, lambda: two.op(x)),
        }
        samples: dict[str, list[Sequence[int]]] = {name: [] for name in ways}
        for bound, call in ways.values():
            _sampled(bound.counted, call, WARM_UP_CALLS)
        compiled_before = echo.made()
        turns = max(1, calls // 1000)
        for _ in range(turns):
            for name, (bound, call) in ways.items():
                samples[name] += _sampled(bound.counted, call, calls // turns)
        compiled = echo.made() - compiled_before
    stages = {name: dict(zip((*STAGES, WHOLE), map(statistics.median, zip(*samples[name], strict=True)), strict=True)) for name in WAYS}
    whole = stages["called"][WHOLE]
    return stages, {name: statistics.median(one[-1] for one in samples[name]) - whole for name in FURTHER}, compiled


class _Bound:
    """An op, and what is counted of its calls."""

    def __init__(self, op: RemoteOp, counted: OpStatistics) -> None:
        self.op = op
        self.counted = counted

    def made(self) -> int:
        """How many of its calls were compiled."""
        return 0 if self.op.fast is None else self.op.fast.made


def _bound(channel: Channel, name: str) -> _Bound:
    op = channel.bind(name)
    return _Bound(op, channel.statistics[-1])


def _sampled(counted: OpStatistics, call: Callable[[], object], calls: int) -> list[Sequence[int]]:
    """Of so many calls, the nanoseconds of each stage and of the whole."""
    samples = []
    for _ in range(calls):
        built, queued, computed, answered = counted.build_ns, counted.queued_ns, counted.compute_ns, counted.rpc_ns
        begun = time.perf_counter_ns()
        call()
        whole = time.perf_counter_ns() - begun
        built, queued, computed = counted.build_ns - built, counted.queued_ns - queued, counted.compute_ns - computed
        answered = counted.rpc_ns - answered
        samples.append((built, queued, computed, answered - built - queued - computed, whole - answered, whole))
    return samples
