"""Calls that were held, run: every one is answered once, whatever becomes of those beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shmbroker
from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.memory.layout import Status
from shmbroker.worker.batch_runs import BatchRuns
from shmbroker.worker.batching import Batch, Batching
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.shares import Shares
from shmbroker.worker.turns import Turns
from tests.worker import test_batching
from tests.worker.conftest import WatchedMemory
from tests.worker.test_batching import Caller, caller

__all__ = ["caller"]


class Runs:
    """What runs batches, and the answers that it gave: by channel, the statuses."""

    def __init__(self, batching: Batching) -> None:
        self.answers: dict[int, list[int]] = {}
        self.shares = Shares()
        self.runs = BatchRuns(batching, Turns(), self.shares, self._run_turn, self._answer)

    def _answer(self, channel: WorkerChannel, lane: ShmWorkerLane, completion: CompletionFields) -> None:
        self.answers.setdefault(channel.number, []).append(completion[1])

    def _run_turn(self, channel: WorkerChannel, lane: ShmWorkerLane) -> bool:
        completion: Any = channel.run_frame(channel.next_waiting(), False)
        self._answer(channel, lane, completion)
        return True

    def run(self, batch: Batch) -> list[int]:
        """The statuses, in the order in which the calls came."""
        channels = [held.channel for held in batch.held]
        self.answers.clear()
        self.runs.run(batch)
        assert not any(channel.waiting for channel in channels)
        assert [len(self.answers[channel.number]) for channel in channels] == [1] * len(channels)
        return [self.answers[channel.number][0] for channel in channels]


def batch_of(batching: Batching, callers: list[Caller], **options: int) -> Batch:
    """Of a call of each, together since that pays."""
    now_ns = test_batching.together(batching, callers) + test_batching.TOKEN_GAP_NS
    for one in callers:
        one.call(0, now_ns, **(options if one is callers[0] else {}))
    (batch,) = batching.due(now_ns)
    assert len(batch.held) == len(callers)
    return batch


def test_together_each_is_answered_with_its_part_of_the_time(caller: Callable[..., Caller]) -> None:
    batching = Batching("user")
    callers = [caller(batching) for _ in range(3)]
    batch = batch_of(batching, callers)
    before = [one.channel.counters.calls for one in callers]
    assert Runs(batching).run(batch) == [Status.OK] * 3
    for one, calls in zip(callers, before, strict=True):
        assert (one.channel.counters.calls - calls, one.channel.counters.batched, one.channel.counters.batched_with) == (1, 1, 3)


def test_a_call_whose_deadline_is_over_is_told_so_and_the_others_are_run(caller: Callable[..., Caller]) -> None:
    batching = Batching("user")
    callers = [caller(batching) for _ in range(3)]
    batch = batch_of(batching, callers, deadline_ns=1)
    assert Runs(batching).run(batch) == [Status.EXPIRED, Status.OK, Status.OK]
    assert callers[0].channel.counters.batched == 0
    assert callers[1].channel.counters.batched_with == 2


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_fails_together_is_run_by_itself(
    caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """B4."""
    batching = Batching("user")
    callers = [caller(batching) for _ in range(2)]
    batch = batch_of(batching, callers)
    costs = dict(batch.gatherer.costs.by_rows)

    def fail(*inputs: torch.Tensor, **options: object) -> None:
        raise error("no such luck")

    monkeypatch.setattr(torch, "cat", fail)
    before = [one.channel.counters.calls for one in callers]
    assert Runs(batching).run(batch) == [Status.OK] * 2
    assert [one.channel.counters.calls for one in callers] == [calls + 1 for calls in before]
    assert batch.gatherer.costs.by_rows[2] == costs[2], "a run that failed tells nothing of what it takes"


def test_a_batch_forgives_nobody_what_it_is_ahead(caller: Callable[..., Caller]) -> None:
    """W1."""
    batching = Batching("user")
    callers = [caller(batching) for _ in range(2)]
    batch, runs = batch_of(batching, callers), Runs(batching)
    for one in callers:
        one.channel.share = runs.shares.open(one.channel.opened.client, "")
    ahead = callers[0].channel.share
    runs.shares.begin(ahead)
    runs.shares.charge(ahead, 1e9)
    assert not runs.runs.is_ahead(batch)
    runs.run(batch)
    assert runs.shares.is_ahead(ahead)


def test_a_device_that_works_on_when_an_op_has_returned_is_refused() -> None:
    with pytest.raises(shmbroker.BadInput, match=r"not computed together on cuda:0, which works on .* leave batch \(--batch\) out"):
        shmbroker.Worker("gpu", device="cuda:0", memory=WatchedMemory(asynchronous=True), batch="user")
