"""A worker's channel whose calls are traced. Made in place of a :class:`WorkerChannel` when the worker has a trace."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from shmbroker.errors import BadFrame
from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.frames import Taken
from shmbroker.memory.layout import Status
from shmbroker.trace.writer import Trace, number_of, numbers_of
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.device_completions import InFlight

_KNOWN_LABELS = 4096

_clock_ns = time.monotonic_ns


@dataclass(slots=True)
class TracedWorkerChannel(WorkerChannel):
    """As a worker's channel; tells the trace of how long each frame waited, and of its running."""

    trace: Trace | None = None
    _labels: dict[bytes, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _divided: tuple[Taken, int] | None = None
    """The call that is being run in pieces, and when it was begun."""

    def run(self, taken: Taken, draining: bool, divide: bool = False) -> CompletionFields | InFlight | None:
        """As the channel's. Of what a device goes on with, the launch is told, and no end."""
        begun_ns = _clock_ns()
        completion = WorkerChannel.run(self, taken, draining, divide)
        if completion is None:
            self._divided = taken, begun_ns
        else:
            self._told(taken, begun_ns, completion)
        return completion

    def expired(self, taken: Taken, taken_ns: int) -> CompletionFields | None:
        """As the channel's."""
        completion = WorkerChannel.expired(self, taken, taken_ns)
        if completion is not None:
            self._told(taken, taken_ns, completion)
        return completion

    def batched(self, taken: Taken, taken_ns: int, compute_ns: int, calls: int) -> CompletionFields:
        """As the channel's. A call that ran with others is told of as one that took its part of the time."""
        completion = WorkerChannel.batched(self, taken, taken_ns, compute_ns, calls)
        self._told(taken, taken_ns, completion)
        return completion

    def go_on(self) -> CompletionFields | None:
        """As the channel's. A call in pieces is told of as one that ran from its first piece to its last."""
        completion = WorkerChannel.go_on(self)
        if completion is not None and self._divided is not None:
            self._told(*self._divided, completion)
            self._divided = None
        return completion

    def _told(self, taken: Taken, begun_ns: int, completion: CompletionFields | InFlight) -> None:
        ended_ns = _clock_ns()
        trace = self.trace
        assert trace is not None
        call_id, _, _, key, frame = taken
        if isinstance(completion, InFlight):
            status, queued_ns, compute_ns = int(Status.OK), 0, 0
        else:
            _, status, queued_ns, compute_ns, _ = completion
        name, details = self._label(key, frame)
        number = number_of(numbers_of(self.number), call_id)
        client = self.opened.client_name
        # The time that a frame gives is its client's claim, and may lie anywhere.
        waited_ns = queued_ns if queued_ns < begun_ns else 0
        trace.begin("queue", f"queue {name}", number, begun_ns - waited_ns, call=call_id, client=client)
        trace.end("queue", f"queue {name}", number, begun_ns)
        trace.span(f"run {name}", begun_ns, ended_ns, call=call_id, client=client, status=_word_of(status), **details)
        computing_ns = max(begun_ns, ended_ns - compute_ns)
        if compute_ns:
            trace.span(f"compute {name}", computing_ns, ended_ns)
        trace.flow("t", number, computing_ns)

    def _label(self, key: bytes, frame: bytes) -> tuple[str, dict[str, Any]]:
        """The op's name, and what it is given."""
        label = self._labels.get(key)
        if label is None:
            try:
                call = self.mapped.reader.read(frame)
            except BadFrame:
                return "bad frame", {}
            op = self.ops.get(call.op_id)
            label = (
                op.name if op is not None else "unknown op",
                {
                    "inputs": [str(place.form.spec) for place in call.inputs],
                    "outputs": [str(place.form.spec) for place in call.outputs],
                },
            )
            if len(self._labels) >= _KNOWN_LABELS:
                self._labels.clear()
            self._labels[key] = label
        return label


def _word_of(status: int) -> str:
    return Status(status).name.lower() if status else "ok"
