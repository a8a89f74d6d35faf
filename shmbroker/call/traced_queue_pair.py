"""A queue pair whose calls are traced. Made in place of a :class:`QueuePair` when its client has a trace, so that others pay nothing."""

from __future__ import annotations

from typing import Any, cast

from shmbroker.arena.spec import spec_of
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.completions import CompletionLoop
from shmbroker.call.kept import LETTING_GO
from shmbroker.call.queue_pair import QueuePair
from shmbroker.call.state import DONE
from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.frames import FrameTemplate
from shmbroker.trace.writer import Trace, number_of, numbers_of


class TracedQueuePair(QueuePair):
    """As a queue pair; tells its client's trace of each call's place, copy, submit, wait and completion."""

    def __init__(self, trace: Trace, channel: int, *args: Any) -> None:
        """``channel``: its number, which both traces have. The rest as a queue pair's."""
        super().__init__(*args)
        self._trace = trace
        self._numbers = numbers_of(channel)
        self.completions = cast(CompletionLoop, _TracedWaits(self.completions, trace))

    def submit(self, call: Call, template: FrameTemplate, offsets: list[int], generations: list[int]) -> None:
        """As the pair's."""
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
        lane = self.lane.kind.value
        trace.span(f"submit {name}", begun_ns, ended_ns, call=call.call_id, worker=self.worker_name, lane=lane)
        trace.flow("s", number, begun_ns)
        sizes = {"sent_bytes": plan.sent_bytes, "received_bytes": plan.received_bytes}
        trace.begin("call", name, number, call.begun_ns, call=call.call_id, inputs=inputs, outputs=outputs, **sizes)

    def finished(self, call: Call, completion: CompletionFields, taken_ns: int) -> None:
        """As the pair's."""
        _, _, queued_ns, compute_ns, _ = completion
        call.finish(completion, taken_ns)
        if call.statistics.name == LETTING_GO:
            return  # of no op, and between two calls
        ended_ns = clock_ns()
        trace, name = self._trace, call.statistics.name
        number = number_of(self._numbers, call.call_id)
        trace.span(f"complete {name}", taken_ns, ended_ns, call=call.call_id)
        trace.flow("f", number, taken_ns)
        trace.end("call", name, number, ended_ns, queued_us=queued_ns / 1000, compute_us=compute_ns / 1000, failed=call.error is not None)


class _TracedWaits:
    """The waiters on a doorbell, whose waits are traced."""

    def __init__(self, loop: CompletionLoop, trace: Trace) -> None:
        self._loop = loop
        self._trace = trace

    def wait(self, call: Call, deadline_ns: int) -> bool:
        """As the loop's."""
        if call.state is DONE:
            return True
        begun_ns = clock_ns()
        done = self._loop.wait(call, deadline_ns)
        self._trace.span(f"wait {call.statistics.name}", begun_ns, clock_ns(), call=call.call_id)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)
