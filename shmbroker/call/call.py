"""A call on its way: what is kept of one while it is outstanding."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from shmbroker.call.completions import Settling, release_waiter
from shmbroker.call.plain_tensors import refuse_gradient
from shmbroker.call.plan import Plan
from shmbroker.call.records import CallRecord
from shmbroker.call.state import DONE, EXPIRED, OUTSTANDING, CallState
from shmbroker.call.statistics import OpStatistics
from shmbroker.call.write_back import Back, copy_back
from shmbroker.errors import BadFrame, BadInput, Busy, CallError, CallTimeout, RemoteOpError, ShmBrokerError, WorkerDraining, anew
from shmbroker.lane.completion_frames import Completion, CompletionFields
from shmbroker.lane.op_error import read_op_error
from shmbroker.memory.layout import Status

Result = torch.Tensor | tuple[torch.Tensor, ...]

clock_ns = time.monotonic_ns
"""The one clock of a call: deadlines in frames are told by it too."""


class Call(CallRecord):
    """One call from submission to completion. It has the holds of the blocks that its frame names, so none is placed anew meanwhile (A5)."""

    __slots__ = ()

    back: Back
    """Set where inputs were copied, as are ``copied_bytes`` and ``copy_ns``."""
    begun_ns: int
    call_id: int
    copied_bytes: int
    copy_ns: int
    deadline_ns: int
    error: ShmBrokerError | None
    future: Settling | None
    holds: Sequence[object]
    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    plan: Plan
    state: CallState
    submitted_ns: int
    wake: threading.Lock | None

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        begun_ns: int,
        deadline_ns: int,
        holds: Sequence[object],
    ) -> None:
        """Times in nanoseconds of CLOCK_MONOTONIC; ``deadline_ns`` 0 for none. ``holds``: of the blocks that the frame names."""
        self.plan = plan
        self.inputs = inputs
        self.outputs = outputs
        self.begun_ns = begun_ns
        self.deadline_ns = deadline_ns
        self.holds = holds
        self.call_id = 0
        self.state = OUTSTANDING
        self.copied_bytes = 0
        self.error = self.wake = self.future = None

    @property
    def statistics(self) -> OpStatistics:
        """Where it is counted."""
        return self.plan.statistics

    def finish(self, completion: CompletionFields, taken_ns: int) -> None:
        """The worker has answered."""
        _, status, queued_ns, compute_ns, _ = completion
        plan = self.plan
        statistics = plan.statistics
        if status and self.state is not EXPIRED:  # that one is counted already
            self.error = self._error_of(Completion(*completion))
            statistics.errors += 1
        elif self.future is not None:
            # A worker's figures are its own claim: it has not answered later than its answer was taken.
            self._check_answered_in_time(min(self.submitted_ns + queued_ns + compute_ns, taken_ns))
        begun_ns = self.begun_ns
        now = clock_ns()
        rpc_ns = now - begun_ns
        statistics.calls += 1
        statistics.rpc_ns += rpc_ns
        statistics.samples.append(rpc_ns)
        plan.buckets[(rpc_ns * rpc_ns).bit_length()] += 1
        # A worker's figures are its own claim: never more than the call took.
        statistics.compute_ns += compute_ns if compute_ns < rpc_ns else rpc_ns
        statistics.queued_ns += queued_ns if queued_ns < rpc_ns else rpc_ns
        statistics.build_ns += self.submitted_ns - begun_ns
        statistics.read_ns += now - taken_ns
        statistics.sent_bytes += plan.sent_bytes
        statistics.received_bytes += plan.received_bytes
        if self.copied_bytes:
            statistics.copied_bytes += self.copied_bytes
            statistics.copy_ns += self.copy_ns
            statistics.build_ns -= self.copy_ns
            if self.back and self.error is None:
                self._copy_back()
        self.inputs = self.holds = ()  # the worker is done with them: nobody need hold their blocks for this call
        self.state = DONE
        if self.wake is not None or self.future is not None:
            self._tell()

    def _copy_back(self) -> None:
        try:
            copy_back(self.back)
        except RuntimeError as error:  # a caller's tensor that was changed in the meantime
            self.error = BadInput(f"op {self.statistics.name!r} was run, and what it wrote cannot be copied back to its inputs: {error}")

    def _check_answered_in_time(self, answered_ns: int) -> None:
        """Of a call that was not waited for: an answer after the deadline is an error, whenever it is taken."""
        if self.deadline_ns and answered_ns > self.deadline_ns and self.state is OUTSTANDING:
            self.statistics.errors += 1
            self.error = CallTimeout(
                f"op {self.statistics.name!r}, call {self.call_id}: answered {(answered_ns - self.begun_ns) / 1e9:.3f} s after it was made, by worker "
                f"{self.plan.carrier.worker_name!r}, and its deadline was after {(self.deadline_ns - self.begun_ns) / 1e9:.3f} s; raise timeout= if "
                "the op needs longer"
            )

    def expire(self) -> None:
        """The deadline has passed. The call stays outstanding, and so holds its blocks, until the worker answers it or dies."""
        if self.state is OUTSTANDING:
            self.plan.statistics.errors += 1
            self.error = self.timeout_error()
            self.state = EXPIRED
            if self.future is not None:
                self.future.settle()

    def fail(self, error: ShmBrokerError) -> None:
        """The call will never be answered."""
        if self.state is not EXPIRED:
            self.error = error
            self.plan.statistics.errors += 1
        self.inputs = self.holds = ()
        self.state = DONE
        self._tell()

    def _tell(self) -> None:
        wake = self.wake
        if wake is not None:
            release_waiter(wake)
        if self.future is not None:
            self.plan.carrier.completions.settle_later(self.future)

    def result(self) -> Result:
        """The outputs of a call that is done, or its error raised."""
        if self.error is not None:
            raise anew(self.error)
        return self.outputs[0] if self.plan.single else tuple(self.outputs)

    def timeout_error(self) -> CallTimeout:
        """What to raise when the deadline has passed."""
        age = (clock_ns() - self.begun_ns) / 1e9
        return CallTimeout(
            f"op {self.statistics.name!r}, call {self.call_id}: no completion after {age:.3f} s from {self.plan.carrier.peer_text()}; its blocks "
            "stay held until the worker is done with them; raise timeout= if the op needs longer"
        )

    def _error_of(self, completion: Completion) -> ShmBrokerError:
        text = completion.body.decode("utf-8", "replace")
        name = self.statistics.name
        peer = self.plan.carrier.worker_name
        if completion.status == Status.OP_ERROR:
            type_name, message, traceback = read_op_error(text)
            return RemoteOpError(f"op {name!r} failed on worker {peer!r}: {type_name}: {message}", type_name, traceback)
        if completion.status == Status.BAD_FRAME:
            return BadFrame(f"worker {peer!r} rejected the frame of op {name!r}: {text}")
        if completion.status == Status.EXPIRED:
            return CallTimeout(f"op {name!r}, call {self.call_id}: its deadline had passed when worker {peer!r} took it; it was not run")
        if completion.status == Status.DRAINING:
            return WorkerDraining(
                f"op {name!r}, call {self.call_id}: worker {peer!r} is shutting down and did not run it; call another worker"
            )
        if completion.status == Status.BUSY:
            return Busy(
                f"op {name!r}, call {self.call_id}: worker {peer!r} refused it before it was begun: {text}; make the same call again in a moment"
            )
        return CallError(f"op {name!r}, call {self.call_id}: worker {peer!r} answered with unknown status {completion.status}")


Places = tuple[tuple[torch.Tensor, int], ...]
"""Captured tensors, each with the address at which it lay then."""


class ReplayedCall(Call):
    """Another call of a captured one that nobody waits for: the same tensors, blocks and frame. ``written``: its outputs, as they lay at the capture."""

    __slots__ = ("written",)

    def __init__(self, like: Call, begun_ns: int, deadline_ns: int, written: Places) -> None:
        super().__init__(like.plan, like.inputs, like.outputs, begun_ns, deadline_ns, like.holds)
        self.written = written

    def result(self) -> Result:
        """As :meth:`Call.result`. Raises :class:`BadInput` when an output does not lie any more where the worker has written it."""
        if self.error is None:
            check_places(f"op {self.statistics.name!r}: captured output", self.written)
        return super().result()


def places_of(tensors: Sequence[torch.Tensor]) -> Places:
    """Where tensors lie."""
    return tuple((tensor, tensor.data_ptr()) for tensor in tensors)


def check_places(what: str, places: Places) -> None:
    """Raise :class:`BadInput` when a tensor does not lie where it lay when it was captured, or would want a gradient. ``what`` names the tensors."""
    for index, (tensor, place) in enumerate(places):
        if tensor.data_ptr() != place:
            raise BadInput(
                f"{what} {index} does not lie where it lay when it was captured (share_memory_(), a multiprocessing queue or set_() gives a tensor "
                "other memory): capture anew, and hand clone() of a tensor to others"
            )
        refuse_gradient(f"{what} {index}", tensor)
