"""Running calls that are held for others: together where that takes less time, each by itself where it does not, or where they fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shmbroker.errors import describe
from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.frames import Taken
from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.worker.batching import Batch, Batching, Held
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.prepared_call import PreparedCall
from shmbroker.worker.shares import Key, Shares
from shmbroker.worker.turns import Turns

log = logging.getLogger(__name__)

_clock_ns = time.monotonic_ns

RunTurn = Callable[[WorkerChannel, ShmWorkerLane], bool]
"""Runs the next call of a channel by itself."""

Answer = Callable[[WorkerChannel, ShmWorkerLane, CompletionFields], None]


class BatchRuns:
    """The frame thread's own. ``turns`` and ``shares``: the worker's."""

    def __init__(self, batching: Batching, turns: Turns, shares: Shares, run_turn: RunTurn, answer: Answer) -> None:
        self.batching = batching
        self._turns = turns
        self._shares = shares
        self._run_turn = run_turn
        self._answer = answer

    def holds(self, channel: WorkerChannel, lane: ShmWorkerLane) -> bool:
        """Whether the call that is next on ``channel`` is held."""
        return self.batching.holds(channel, lane, _clock_ns(), self._prepared)

    def next_of(self, due: list[Batch]) -> tuple[Key, Batch] | None:
        """Whose turn it is of batches that are due."""
        return min([(self._key_of(batch), batch) for batch in due], key=lambda one: one[0], default=None)

    def is_ahead(self, batch: Batch) -> bool:
        """Whether all clients of a batch have had so much that others go first."""
        return all([self._shares.is_ahead(held.channel.share) for held in batch.held])

    def run(self, batch: Batch) -> None:
        """Run its calls."""
        if not self.batching.begin(batch, _clock_ns()):
            self._run_apart(batch, failed=False)
        elif not self._run_together(batch):
            self._run_apart(batch, failed=True)

    def _key_of(self, batch: Batch) -> Key:
        return min([self._shares.key(held.channel.share) for held in batch.held])

    def _prepared(self, channel: WorkerChannel, taken: Taken) -> PreparedCall | None:
        """The call of a frame that may be run with others, opened on its client's time where it was not met before."""
        known = channel.known(taken)
        if known is not None or self._shares.is_ahead(channel.share) or not channel.may_be_opened(taken):
            return known
        self._take_turn(self._shares.key(channel.share))
        try:
            begun_ns = _clock_ns()
            self._shares.begin(channel.share)
            opened = channel.opened_ahead(taken)
            self._shares.charge(channel.share, _clock_ns() - begun_ns)
            return opened
        finally:
            self._turns.give_back()

    def _take_turn(self, key: Key) -> None:
        if self._turns.waiting or not self._turns.device.acquire(False):
            self._turns.wait(key)

    def _run_apart(self, batch: Batch, *, failed: bool) -> None:
        """``failed``: together they have. Who fails alone too is run alone for a while (B4)."""
        for held in batch.held:
            counters = held.channel.counters
            before_ns, errors = counters.compute_ns, counters.errors
            self._run_turn(held.channel, held.lane)
            took_ns = counters.compute_ns - before_ns
            if counters.errors != errors:
                if failed:
                    self.batching.leave_alone(held, _clock_ns())
            elif took_ns > 0:
                batch.gatherer.costs.measured(held.rows, took_ns)
        self.batching.ended(batch, _clock_ns(), None)

    def _run_together(self, batch: Batch) -> bool:
        """False where the op has failed: then nothing was answered but what came too late."""
        shares = self._shares
        self._take_turn(self._key_of(batch))
        try:
            begun_ns = _clock_ns()
            batch.held = [held for held in batch.held if not self._is_over(held, begun_ns)]
            if not batch.held:
                return True
            first = min(batch.held, key=lambda held: shares.key(held.channel.share))
            shares.begin(first.channel.share)
            for held in batch.held:
                if held is not first:
                    shares.join(held.channel.share)
            failed = False
            try:
                batch.gatherer.run([(held.prepared, held.rows) for held in batch.held])
            except BaseException as error:  # whatever the op raises, SystemExit too
                failed = True
                # Its text alone: whoever keeps what is logged would keep the inputs with its traceback.
                log.info("calls of %d clients failed together, and are run one by one: %s", len(batch.held), describe(error))
            done_ns = _clock_ns()
            part_ns = (done_ns - begun_ns) // sum([held.rows for held in batch.held])
            for held in batch.held:
                shares.charge(held.channel.share, part_ns * held.rows)
        finally:
            self._turns.give_back()
        if failed:
            return False
        self.batching.ended(batch, done_ns, done_ns - begun_ns)
        for held in batch.held:
            held.channel.next_waiting()
            self._answer(held.channel, held.lane, held.channel.batched(held.taken, begun_ns, part_ns * held.rows, len(batch.held)))
        return True

    def _is_over(self, held: Held, now_ns: int) -> bool:
        """Whether a call's deadline is; then it is answered, and not run."""
        expired = held.channel.expired(held.taken, now_ns)
        if expired is None:
            return False
        held.channel.next_waiting()
        self._answer(held.channel, held.lane, expired)
        return True
