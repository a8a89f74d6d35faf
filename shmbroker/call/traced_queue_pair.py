"""A channel whose calls are traced. Made in place of a :class:`Channel` when its client has a trace, so that others pay nothing."""

from __future__ import annotations

from typing import Any, cast

from shmbroker.arena.spec import spec_of
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.completions import CompletionLoop
from shmbroker.call.remote_op import RemoteOp
from shmbroker.call.statistics import OpStatistics
from shmbroker.client.channel import Channel
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.outputs import OutSpec
from shmbroker.trace.writer import Trace, number_of, numbers_of


class TracedChannel(Channel):
    """As a channel; tells its client's trace of each call's place, copy, submit, wait and completion."""

    def __init__(self, trace: Trace, *args: Any) -> None:
        super().__init__(*args)
        self._trace = trace
        self._numbers = numbers_of(self._opened.channel)
        self.completions = cast(CompletionLoop, _TracedWaits(self.completions, trace))

    def bind_counted(self, op: str, statistics: OpStatistics, /, *, out_spec: OutSpec | None = None, **static: Any) -> RemoteOp:
        """As the channel's."""
        statistics.on_finish = _finished
        return super().bind_counted(op, statistics, out_spec=out_spec, **static)

    def submit(self, call: Call, template: FrameTemplate, offsets: list[int], generations: list[int]) -> None:
        """As the channel's."""
        inputs = [str(spec_of(tensor)) for tensor in call.inputs]  # now: when the call is done it knows them no more
        outputs = [str(spec_of(tensor)) for tensor in call.outputs]
        begun_ns = clock_ns()
        super().submit(call, template, offsets, generations)
        ended_ns = clock_ns()
        trace, plan, name = self._trace, call.plan, call.statistics.name
        number = number_of(self._numbers, call.call_id)
        trace.span(f"place {name}", call.begun_ns, begun_ns)
        if call.copied_bytes:
            trace.span(f"copy {name}", call.begun_ns, call.begun_ns + call.copy_ns, bytes=call.copied_bytes)
        trace.span(f"submit {name}", begun_ns, ended_ns, call=call.call_id, worker=self.worker_name, lane=self.lane)
        trace.flow("s", number, begun_ns)
        sizes = {"bytes_out": plan.bytes_out, "bytes_in": plan.bytes_in}
        trace.begin("call", name, number, call.begun_ns, call=call.call_id, inputs=inputs, outputs=outputs, **sizes)

    def finished(self, call: Call, queued_ns: int, compute_ns: int, taken_ns: int, ended_ns: int) -> None:
        """A completion of ``call`` was taken, by this thread."""
        trace, name = self._trace, call.statistics.name
        number = number_of(self._numbers, call.call_id)
        trace.span(f"complete {name}", taken_ns, ended_ns, call=call.call_id)
        trace.flow("f", number, taken_ns)
        trace.end("call", name, number, ended_ns, queued_us=queued_ns / 1000, compute_us=compute_ns / 1000, failed=call.error is not None)


def _finished(call: Call, queued_ns: int, compute_ns: int, taken_ns: int, ended_ns: int) -> None:
    """The counters of a :class:`FailoverChannel`'s op go from channel to channel; the call knows its own."""
    channel = call.channel
    if isinstance(channel, TracedChannel):
        channel.finished(call, queued_ns, compute_ns, taken_ns, ended_ns)


class _TracedWaits:
    """The waiters on a doorbell, whose waits are traced."""

    def __init__(self, loop: CompletionLoop, trace: Trace) -> None:
        self._loop = loop
        self._trace = trace

    def wait(self, call: Call, deadline_ns: int) -> bool:
        """As the loop's."""
        if call.done:
            return True
        begun_ns = clock_ns()
        done = self._loop.wait(call, deadline_ns)
        self._trace.span(f"wait {call.statistics.name}", begun_ns, clock_ns(), call=call.call_id)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)
