"""``steps``: where the time of one call goes. Each step is measured alone, in one process, with both ends of a channel in it; best of five."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import shmbroker
from benchmarks.contenders import shmbroker_calls
from benchmarks.table import Table
from shmbroker.arena.arena import Arena
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.completions import CompletionLoop, Waitable
from shmbroker.call.plan import Plan
from shmbroker.call.state import DONE, OUTSTANDING
from shmbroker.call.statistics import OpStatistics, no_calls
from shmbroker.control.liveness import Watch, this_process
from shmbroker.control.messages import OpenChannel
from shmbroker.lane.doorbell import PollingBell
from shmbroker.lane.ends import COMPILED
from shmbroker.lane.outputs import Outputs
from shmbroker.lane.shm_lane import ShmClientLane, ShmWorkerLane
from shmbroker.lane.waiter import Waiter
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import OpDefinition

ROUNDS = 5
SHAPE = (1, 1024, 2048)
"""8 MiB of float32."""


@contextmanager
def _segment(geometry: Geometry) -> Iterator[Segment]:
    name = names.segment_name("steps", names.new_id())
    hold = make_segment(name, geometry, instance="steps", owner="00", owner_pid=1)
    try:
        segment = Segment.attach(name, hold=False)
    finally:
        hold.release()
        unlink_segment(name)
    yield segment
    segment.close()


class _Uncarried:
    """The carrier of calls that are made and finished, and never sent."""

    worker_name = "nobody"

    def __init__(self) -> None:
        self.buckets = no_calls()
        self.completions = CompletionLoop(Waiter(PollingBell()).wait)

    def peer_text(self) -> str:
        return "nobody"

    def wait(self, call: Waitable, timeout: float | None = None) -> bool:
        return True


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


def run(calls: int = 50_000) -> dict[str, Any]:
    """Measure each step, and the whole call between two processes. Nanoseconds."""

    def ns(step: Callable[[], object]) -> float:
        for _ in range(100):
            step()
        best = float("inf")
        for _ in range(ROUNDS):
            begun = time.perf_counter_ns()
            for _ in range(calls // ROUNDS):
                step()
            best = min(best, (time.perf_counter_ns() - begun) / (calls // ROUNDS))
        return best

    with _segment(Geometry(64 << 20)) as segment:
        arena = Arena(segment)
        client, worker = ShmClientLane(segment, 0, PollingBell()), ShmWorkerLane(segment, 0, PollingBell())
        process = this_process()
        opening = OpenChannel(
            client="00", client_name="steps", process=process, segment=segment.name, index=0, service="", lane="", doorbell="", bell=""
        )
        channel = WorkerChannel(1, opening, MappedSegment(segment), Watch(process))
        op_id = channel.bind(OpDefinition("echo", lambda x, *, out: None, lambda x: x).bind({}, {}))
        x = arena.empty(SHAPE, torch.float32)
        plan = Plan(
            _Uncarried(),
            OpStatistics("echo"),
            op_id,
            [x],
            Outputs((shmbroker.TensorSpec(x.shape, x.dtype),), True),
            b"",
        )
        y, offset, generation = arena.place(plan.rooms[0])
        place = arena.find(x)
        assert place is not None
        offsets, generations = [place.offset, offset], [place.generation, generation]

        def submit_and_take() -> Any:
            client.submit(plan.template, 1, 0, 1, offsets, generations)
            return worker.take()

        def and_run() -> Any:
            return channel.run(submit_and_take(), False)

        def and_complete() -> None:
            worker.complete(and_run())
            client.take()

        def prepare() -> None:
            arena.blocks.get(x.data_ptr() - arena.address)
            x.is_neg()
            hash((x.shape, x.dtype, x.stride()))
            Call(plan, (x,), [y], clock_ns(), 0)

        completion = (1, 0, 1, 1, b"")

        def finish() -> None:
            call = Call(plan, (x,), [y], 1, 0)
            call.submitted_ns = 1
            call.finish(completion, clock_ns())

        made = ns(lambda: Call(plan, (x,), [y], 1, 0))
        loop = CompletionLoop(Waiter(PollingBell()).wait)
        source = _AlwaysThere(client)
        loop.add(source)
        last = Call(plan, (x,), [y], 1, 0)

        def wait() -> None:
            last.state = OUTSTANDING
            source.call = last
            loop.wait(last, 0)

        taken, ran, completed = ns(submit_and_take), ns(and_run), ns(and_complete)
        client.submit(plan.template, 1, 0, 1, offsets, generations)
        worker.complete((1, 0, 1, 1, b""))  # left there, so that whoever waits finds one
        steps = {
            "client: find the input, look up the plan, make the call's record": ns(prepare),
            "client: place the output and make its tensor; later let go of it": ns(lambda: arena.place(plan.rooms[0])),
            "client: write and publish the frame; worker: copy and recognise it": taken,
            "worker: run an op that does nothing, count": ran - taken,
            "worker: write and publish the completion; client: read it": completed - ran,
            "client: wait (once it is there)": ns(wait),
            "client: finish the call, count": ns(finish) - made,
        }
        client.close()
        worker.close()
        channel.close()
        arena.close()
    with shmbroker_calls(8 << 20) as ours:
        whole = {name: _median_ns(ours[name], calls) for name in ("call", "replay")}
    table = Table(f"one call, {'compiled' if COMPILED else 'in Python'}", ["step", "ns"])
    for name, cost in steps.items():
        table.row(name, f"{cost:.0f}")
    table.row("sum of the steps", f"{sum(steps.values()):.0f}")
    table.row("the whole call between two processes, median", f"{whole['call']:.0f}")
    table.row("  replayed", f"{whole['replay']:.0f}")
    table.show()
    return {"compiled": COMPILED, "steps_ns": steps, "call_ns": whole["call"], "replay_ns": whole["replay"]}


def _median_ns(call: Callable[[], object], calls: int) -> float:
    samples = []
    for _ in range(max(calls, 100)):
        begun = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - begun)
    return float(sorted(samples)[len(samples) // 2])
