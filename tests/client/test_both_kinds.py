"""One suite for both kinds of channel, plain and with failover: what a program may rely on that does not care which it has."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time

import pytest
import torch

import shmbroker
from shmbroker.client.channel import Channel
from shmbroker.client.failover import FailoverChannel
from tests.peers import LANES
from tests.processes import wait_until

AnyChannel = Channel | FailoverChannel
SECONDS = 120.0
"""In which whatever is waited for must have come: many times what it takes."""


@pytest.fixture(params=LANES, ids=["shm-sem", "shm-poll", "zmq"])
def lane(request: pytest.FixtureRequest) -> tuple[str, str]:
    told: tuple[str, str] = request.param
    return told


@pytest.fixture(params=["plain", "failover"])
def either(request: pytest.FixtureRequest, client: shmbroker.Client, worker: int, lane: tuple[str, str]) -> AnyChannel:
    make = client.channel if request.param == "plain" else client.failover_channel
    return make("test", lane=lane[0], doorbell=lane[1])


def outstanding(channel: AnyChannel) -> int:
    return channel.outstanding if isinstance(channel, Channel) else channel.channel.outstanding


# --- calls ------------------------------------------------------------------------------------------------------------------------------


def test_a_call_returns_its_outputs_or_raises_its_error(either: AnyChannel) -> None:
    assert either.bind("scale", factor=3.0)(torch.ones(2)).tolist() == [3.0, 3.0]
    assert [half.tolist() for half in either.bind("split_in_two")(torch.arange(4))] == [[0, 1], [2, 3]]
    assert either.bind("add")(torch.ones(1), term=2.0).item() == 3.0
    with pytest.raises(shmbroker.RemoteOpError, match="ValueError: no such luck") as caught:
        either.bind("fail")(torch.ones(1))
    assert "in fail" in caught.value.worker_traceback
    with pytest.raises(shmbroker.BadInput, match="has no op 'nope'"):
        either.bind("nope")
    with pytest.raises(shmbroker.BadInput, match="must be a positive number of seconds"):
        either.bind("double")(torch.ones(1), timeout=0)
    with pytest.raises(shmbroker.CallTimeout):
        either.bind("sleep", seconds=1.0)(torch.ones(1), timeout=0.1)
    assert either.bind("double")(torch.ones(1)).item() == 2.0


def test_keep_works_or_says_why_not_and_what_to_do(either: AnyChannel) -> None:
    double = either.bind("double")
    if isinstance(either, Channel):
        assert double(double.keep(torch.ones(2)).fetch()).tolist() == [4.0, 4.0]
    else:
        with pytest.raises(
            shmbroker.BadInput, match=r"dies with it, and no other could go on from there; .* client.channel\(\.\.\.\) for keep"
        ):
            double.keep(torch.ones(2))


# --- futures ----------------------------------------------------------------------------------------------------------------------------


def test_a_future_becomes_done_without_anybody_asking_for_its_result(either: AnyChannel) -> None:
    future = either.bind("double").submit(torch.ones(2))
    wait_until(future.done, SECONDS)
    assert not future.running()
    assert future.result(0).tolist() == [2.0, 2.0]
    failed = either.bind("fail").submit(torch.ones(2))
    wait_until(lambda: not failed.running(), SECONDS)
    assert isinstance(failed.exception(0), shmbroker.RemoteOpError)
    slow = either.bind("sleep", seconds=0.5).submit(torch.ones(1))
    assert (slow.done(), slow.running(), slow.cancel()) == (False, True, False)
    assert slow.result(SECONDS).item() == 1.0


def test_a_deadline_that_passed_is_an_error_for_who_looks_late_too(either: AnyChannel) -> None:
    """Whether the answer has come meanwhile or not."""
    slow = either.bind("sleep", seconds=0.5)
    unanswered = slow.submit(torch.ones(1), timeout=0.1)
    wait_until(unanswered.done, SECONDS)
    assert isinstance(unanswered.exception(0), shmbroker.CallTimeout)
    wait_until(lambda: either.bind("double")(torch.ones(1)).item() == 2.0 and not outstanding(either), SECONDS)
    for look in ("result", "exception", "done", "callback", "wait"):
        future = slow.submit(torch.ones(1), timeout=0.1)
        time.sleep(1.0)  # the worker answers meanwhile, unless it is very slow: the outcome is the same
        if look == "done":
            wait_until(future.done, SECONDS)
        elif look == "callback":
            called = threading.Event()
            future.add_done_callback(lambda future, called=called: called.set())
            assert called.wait(SECONDS)
        elif look == "wait":
            assert concurrent.futures.wait([future], SECONDS).done == {future}
        error = future.exception(SECONDS)
        assert isinstance(error, shmbroker.CallTimeout), look
        with pytest.raises(shmbroker.CallTimeout):
            future.result(0)


def test_an_answer_in_time_is_a_result_for_who_looks_late(either: AnyChannel) -> None:
    double = either.bind("double")
    double(torch.ones(1))
    future = double.submit(torch.ones(1), timeout=3.0)
    time.sleep(3.1)
    assert future.result().item() == 2.0


def test_futures_are_good_for_concurrent_futures(either: AnyChannel) -> None:
    op = either.bind("scale", factor=2.0)
    futures = [op.submit(torch.full((1,), float(number))) for number in range(8)]
    done, pending = concurrent.futures.wait(futures, timeout=SECONDS)
    assert (len(done), len(pending)) == (8, 0)
    futures = [op.submit(torch.full((1,), float(number))) for number in range(8)]
    assert sorted(future.result().item() for future in concurrent.futures.as_completed(futures, SECONDS)) == [2.0 * n for n in range(8)]
    slow = either.bind("sleep", seconds=1.0).submit(torch.ones(1))
    assert concurrent.futures.wait([slow], timeout=0.05).not_done == {slow}
    first = concurrent.futures.wait([slow, op.submit(torch.ones(1))], SECONDS, concurrent.futures.FIRST_COMPLETED)
    assert first.done
    assert slow.result(SECONDS).item() == 1.0
    with pytest.raises(TimeoutError):
        either.bind("sleep", seconds=0.5).submit(torch.ones(1)).result(0.01)


def test_futures_are_good_for_asyncio(either: AnyChannel) -> None:
    op, fail = either.bind("scale", factor=2.0), either.bind("fail")

    async def gather() -> list[torch.Tensor]:
        with pytest.raises(shmbroker.RemoteOpError):
            await fail.submit(torch.ones(1))
        with pytest.raises(shmbroker.CallTimeout):
            await either.bind("sleep", seconds=0.5).submit(torch.ones(1), timeout=0.1)
        assert (await op.submit(torch.ones(1))).item() == 2.0
        return await asyncio.gather(*[op.submit(torch.full((1,), float(number))) for number in range(8)])

    assert [tensor.item() for tensor in asyncio.run(gather())] == [2.0 * number for number in range(8)]


def test_a_callback_may_call_and_is_called_once(either: AnyChannel) -> None:
    double = either.bind("double")
    told: list[float] = []
    over = threading.Event()

    def call_again(future: concurrent.futures.Future[torch.Tensor]) -> None:
        told.append(double(future.result()).item())
        over.set()

    future = double.submit(torch.ones(1))
    future.add_done_callback(call_again)
    assert over.wait(SECONDS)
    assert future.result(SECONDS).item() == 2.0
    assert told == [4.0]
    future.add_done_callback(lambda future: told.append(0.0))
    assert told == [4.0, 0.0], "at once, of a future that is done"


def test_a_future_that_nobody_holds_lets_its_tensors_go_at_once(either: AnyChannel) -> None:
    """Without the collector: nothing of a future keeps another part of it alive."""
    double = either.bind("double")
    x = either.memory.copy_in(torch.ones(100))
    double(x)
    gc.collect()
    gc.disable()
    try:
        before = either.memory.arena.occupancy().blocks
        for kind in ("result", "done", "callback", "waited for"):
            future = double.submit(x)
            if kind == "done":
                wait_until(future.done, SECONDS)
            elif kind == "callback":
                future.add_done_callback(lambda future: None)
            elif kind == "waited for":
                concurrent.futures.wait([future], SECONDS)
            assert future.result().sum() == 200, kind
            del future
            wait_until(lambda: either.memory.arena.occupancy().blocks == before, SECONDS)
    finally:
        gc.enable()


# --- captures ---------------------------------------------------------------------------------------------------------------------------


def test_a_captured_call_is_replayed_and_submitted_on_the_same_blocks(either: AnyChannel) -> None:
    captured = either.bind("double").capture(torch.ones(3))
    assert captured.replay().tolist() == [2.0] * 3
    captured.inputs[0].fill_(5.0)
    future = captured.submit(timeout=SECONDS)
    wait_until(future.done, SECONDS)
    assert future.result().tolist() == [10.0] * 3
    assert captured.outputs[0].tolist() == [10.0] * 3

    async def wait() -> list[float]:
        told: list[float] = (await captured.submit()).tolist()
        return told

    assert asyncio.run(wait()) == [10.0] * 3
    assert concurrent.futures.wait([captured.submit()], SECONDS).done
    with pytest.raises(shmbroker.CallTimeout):
        either.bind("sleep", seconds=0.5).capture(torch.ones(1)).replay(timeout=0.1)


# --- reports and the end ----------------------------------------------------------------------------------------------------------------


def test_the_report_counts_calls_however_they_were_made(either: AnyChannel) -> None:
    double, fail = either.bind("double"), either.bind("fail")
    captured = double.capture(torch.ones(1))
    for call in (
        lambda: double(torch.ones(1)),
        lambda: double.submit(torch.ones(1)).result(),
        captured.replay,
        lambda: captured.submit().result(),
    ):
        call()
    for call in (lambda: fail(torch.ones(1)), lambda: fail.submit(torch.ones(1)).result()):
        with pytest.raises(shmbroker.RemoteOpError):
            call()
    report = either.report()
    assert {one.op: (one.calls, one.errors) for one in report.ops} == {"double": (4, 0), "fail": (2, 2)}
    assert (report.total.calls, report.failovers) == (6, 0)
    either.forget_statistics()
    assert either.report().total.calls == 0


def test_what_is_outstanding_when_the_channel_is_closed_fails_and_nobody_takes_over(either: AnyChannel) -> None:
    slow = either.bind("sleep", seconds=1.0)
    futures = [slow.submit(torch.ones(1)) for _ in range(4)]
    called = threading.Event()
    futures[0].add_done_callback(lambda future: called.set())
    either.close()
    either.close()
    assert called.wait(SECONDS)
    assert concurrent.futures.wait(futures[1:3], SECONDS).not_done == set()
    wait_until(futures[3].done, SECONDS)
    for future in futures:
        assert isinstance(future.exception(SECONDS), shmbroker.WorkerLost)
    with pytest.raises(shmbroker.ChannelError):
        slow(torch.ones(1))
    assert either.report().total.errors == 4 or isinstance(either, FailoverChannel)


# --- what they show ---------------------------------------------------------------------------------------------------------------------


def test_channels_and_ops_tell_what_they_are(either: AnyChannel) -> None:
    double = either.bind("double")
    double(torch.ones(1))
    kind = "Channel" if isinstance(either, Channel) else "FailoverChannel"
    assert repr(either).startswith(f"<{kind} for 'test'")
    for word in ("worker 'test-worker' (pid ", "running)", f"lane {either.lane}", "0 calls outstanding"):
        assert word in repr(either)
    assert "Op 'double' on worker 'test-worker' (pid " in repr(double)
    assert "float32[1] to float32[1]" in repr(double.capture(torch.ones(1))) or kind == "FailoverChannel"
    either.close()
    assert "closed" in repr(either)
