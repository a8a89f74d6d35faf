"""The steps of one call as functions, with both ends of a channel in one process.

This is the one benchmark that reaches for what lies inside of ``call/``, ``lane/`` and ``worker/``, on purpose: each step alone is what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from shmbroker import TensorSpec
from shmbroker.arena.arena import Arena
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.completions import CompletionLoop, Waitable
from shmbroker.call.plan import Plan
from shmbroker.call.state import DONE, OUTSTANDING
from shmbroker.call.statistics import OpStatistics, no_calls
from shmbroker.control.liveness import Watch, this_process
from shmbroker.control.messages import OpenChannel
from shmbroker.lane.doorbell import PollingBell
from shmbroker.lane.outputs import Outputs
from shmbroker.lane.shm_lane import ShmClientLane, ShmWorkerLane
from shmbroker.lane.waiter import Waiter
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from shmbroker.worker import compiled_steps
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.compiled_steps import Steps
from shmbroker.worker.counters import STEPS_COMPILED
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import OpDefinition
from shmbroker.worker.shares import Share
from shmbroker.worker.turns import Turns

SHAPE = (1, 1024, 2048)
"""8 MiB of float32."""

COMPLETION = (1, 0, 1, 1, b"")
"""A completion of call 1: status, times, no text."""


@dataclass(frozen=True, slots=True)
class StepsOfACall:
    """Each to be called again and again. The longer ones hold the shorter ones."""

    prepare: Callable[[], object]
    """Find the input, look up the plan, make the call's record."""
    place: Callable[[], object]
    """Place the output and make its tensor; later let go of it."""
    submit_and_take: Callable[[], object]
    """Write and publish the frame; copy and recognise it."""
    and_run: Callable[[], object]
    """And run an op that does nothing, and count."""
    and_complete: Callable[[], object]
    """And write and publish the completion, and read it."""
    make: Callable[[], object]
    """Make a call's record."""
    and_finish: Callable[[], object]
    """And finish it, and count."""
    leave_completion: Callable[[], object]
    """Leave a completion there, once, so that whoever waits finds one."""
    wait: Callable[[], object]
    """Wait, once it is there."""
    compiled_step: Callable[[], object] | None
    """Write and publish the frame; have the worker's compiled step take it, run an op that does nothing, and complete it; read the completion."""


class _Carrier:
    """Stands for what carries calls that are made and finished, and never sent."""

    worker_name = "steps"

    def __init__(self) -> None:
        self.buckets = no_calls()
        self.completions = CompletionLoop(Waiter(PollingBell()).wait)

    def peer_text(self) -> str:
        return "no peer"

    def wait(self, call: Waitable, timeout: float | None = None) -> bool:
        raise NotImplementedError


class _AlwaysThere:
    """A source whose completion has come already: waiting for it costs what waiting costs."""

    def __init__(self, lane: ShmClientLane) -> None:
        self.has_frames = lane.ready
        self.receivers = lane.receivers
        self.call: Any = None

    def drain(self) -> None:
        self.call.state = DONE

    def check_peer(self) -> None:
        pass


@contextmanager
def _segment() -> Iterator[Segment]:
    name = names.segment_name("steps", names.new_id())
    hold = make_segment(name, Geometry(64 << 20), instance="steps", owner="00", owner_pid=1)
    try:
        segment = Segment.attach(name, hold=False)
    finally:
        hold.release()
        unlink_segment(name)
    yield segment
    segment.close()


@contextmanager
def _without_looking_on() -> Iterator[None]:
    """Compiled steps end when there is no call, instead of looking for the next one for a while."""
    looked_ns, compiled_steps.LOOK_NS = compiled_steps.LOOK_NS, 0
    try:
        yield
    finally:
        compiled_steps.LOOK_NS = looked_ns


@contextmanager
def steps_of_a_call() -> Iterator[StepsOfACall]:
    """The steps of a call with one input and one output of ``SHAPE``."""
    with _segment() as segment, _without_looking_on():
        arena = Arena(segment)
        client, worker = ShmClientLane(segment, 0, PollingBell()), ShmWorkerLane(segment, 0, PollingBell())
        process = this_process()
        opening = OpenChannel(
            client="00", client_name="steps", process=process, segment=segment.name, index=0, service="", lane="", doorbell="", bell=""
        )
        channel = WorkerChannel(1, opening, MappedSegment(segment), Watch(process), Share("00", 1.0))
        op_id = channel.bind(OpDefinition("echo", lambda x, *, out: None, lambda x: x).bind({}, {}))
        x = arena.empty(SHAPE, torch.float32)
        carrier = _Carrier()
        plan = Plan(carrier, OpStatistics("echo"), op_id, [x], Outputs((TensorSpec(x.shape, x.dtype),), True), b"")
        y, block = arena.place(plan.rooms[0])
        location = arena.find(x)
        assert location is not None
        offsets, generations = [location.offset, block.offset], [location.generation, block.generation]
        holds = [location.block.hold, block.hold]
        loop = carrier.completions
        source = _AlwaysThere(client)
        loop.add(source)
        steps = Steps(Turns(), lambda channel: None)
        steps.of([(channel, worker)])
        last = Call(plan, (x,), [y], 1, 0, holds)

        def prepare() -> None:
            found = arena.blocks.get(x.data_ptr() - arena.address)
            _ = x.requires_grad or x.is_neg()
            holds = [found.hold]  # type: ignore[union-attr]
            hash((x.shape, x.dtype, x.stride()))
            Call(plan, (x,), [y], clock_ns(), 0, holds)

        def submit_and_take() -> Any:
            client.submit(plan.template, 1, 0, 1, offsets, generations)
            return worker.take()

        def and_run() -> Any:
            return channel.run(submit_and_take(), False)

        def and_complete() -> None:
            worker.complete(and_run())
            client.take()

        def compiled_step() -> None:
            client.submit(plan.template, 1, 0, 1, offsets, generations)
            steps.run()
            if client.take() is None:
                raise RuntimeError("the worker's compiled step has left a call that is ordinary")

        def and_finish() -> None:
            call = Call(plan, (x,), [y], 1, 0, holds)
            call.submitted_ns = 1
            call.finish(COMPLETION, clock_ns())

        def leave_completion() -> None:
            client.submit(plan.template, 1, 0, 1, offsets, generations)
            worker.complete(COMPLETION)

        def wait() -> None:
            last.state = OUTSTANDING
            source.call = last
            loop.wait(last, 0)

        yield StepsOfACall(
            prepare=prepare,
            place=lambda: arena.place(plan.rooms[0]),
            submit_and_take=submit_and_take,
            and_run=and_run,
            and_complete=and_complete,
            make=lambda: Call(plan, (x,), [y], 1, 0, holds),
            and_finish=and_finish,
            leave_completion=leave_completion,
            wait=wait,
            compiled_step=compiled_step if STEPS_COMPILED else None,
        )
        steps.of(())
        client.close()
        worker.close()
        channel.close()
        arena.close()
