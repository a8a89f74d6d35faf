"""Ordinary calls taken, run and completed without Python, where the compiled steps are there. What is ordinary is told in ``_steps.c``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.counters import STEPS_COMPILED
from shmbroker.worker.prepared_call import PreparedCall
from shmbroker.worker.turns import Turns

LOOK_NS = 5000
"""How long to look for the next call before what else there is to do is done. The interpreter lock is held meanwhile."""

MOST_NS = 100_000
"""How long ordinary calls are run before what else there is to do is done: some calls' time more where one takes longer."""

if STEPS_COMPILED or TYPE_CHECKING:
    from shmbroker.lane import _ends
    from shmbroker.worker import _steps

    _steps.set_up(WorkerChannel, PreparedCall, _ends.SubmissionReceiver, _ends.CompletionSender)


class Steps:
    """The compiled steps of all lanes; none where they are not there. The frame thread's own."""

    def __init__(self, turns: Turns, overfull: Callable[[WorkerChannel], None]) -> None:
        """``overfull``: told of a channel whose client has left its completion queue full."""
        self._turns = turns
        self._overfull = overfull
        self._steps: tuple[Any, ...] = ()

    def of(self, lanes: Sequence[tuple[WorkerChannel, ShmWorkerLane]]) -> None:
        """Be those of ``lanes``, and of no others: what is not told any more keeps nobody's memory."""
        ordinary = STEPS_COMPILED and all([type(channel) is WorkerChannel for channel, _ in lanes])  # a traced one tells of each call
        self._steps = tuple([self._step(channel, lane) for channel, lane in lanes]) if ordinary else ()

    def run(self) -> bool:
        """Run ordinary calls as they come, for a moment; whether there were any, and no other call."""
        return bool(self._steps) and _steps.run(self._steps, LOOK_NS, MOST_NS) > 0

    def _step(self, channel: WorkerChannel, lane: ShmWorkerLane) -> Any:
        turns = self._turns

        def overfull() -> None:
            self._overfull(channel)

        return _steps.Step(
            channel,
            channel.counters,
            lane.receiver,
            lane.sender,
            turns.waiting,
            turns.device.acquire,
            turns.device.release,
            turns.give_back,
            channel.ended,
            channel.failed,
            lane.complete,
            overfull,
        )
