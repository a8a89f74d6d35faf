"""Calls that are submitted: futures, for threads, for asyncio, and for nobody at all."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading

import pytest
import torch

import shmbroker
from shmbroker.client.channel import Channel
from tests.processes import wait_until


def test_submitted_calls_complete_as_futures_in_any_order_of_asking(channel: Channel) -> None:
    op = channel.bind("scale", factor=2.0)
    futures = [op.submit(torch.full((3,), float(number))) for number in range(20)]
    for number in reversed(range(20)):
        assert futures[number].result(timeout=120).tolist() == [2.0 * number] * 3


def test_futures_work_with_concurrent_futures_and_asyncio(channel: Channel) -> None:
    op = channel.bind("scale", factor=2.0)
    futures = [op.submit(torch.full((1,), float(number))) for number in range(8)]
    done, pending = concurrent.futures.wait(futures, timeout=120)
    assert (len(done), len(pending)) == (8, 0)
    called = threading.Event()
    op.submit(torch.ones(1)).add_done_callback(lambda future: called.set())
    assert called.wait(300)

    async def gather() -> list[torch.Tensor]:
        return await asyncio.gather(*[op.submit(torch.full((1,), float(number))) for number in range(8)])

    assert [tensor.item() for tensor in asyncio.run(gather())] == [2.0 * number for number in range(8)]


def test_a_future_that_is_awaited_or_has_a_callback_keeps_its_deadline(channel: Channel) -> None:
    slow = channel.bind("sleep", seconds=5.0)

    async def wait() -> None:
        await slow.submit(torch.ones(1), timeout=0.1)

    with pytest.raises(shmbroker.CallTimeout):
        asyncio.run(wait())
    assert channel.outstanding == 1, "the worker is still at it"
    told: list[BaseException | None] = []
    called = threading.Event()
    future = slow.submit(torch.ones(1), timeout=0.1)
    future.add_done_callback(lambda future: (told.append(future.exception()), called.set()))
    assert called.wait(300)
    assert isinstance(told[0], shmbroker.CallTimeout)
    assert channel.outstanding == 2
    channel.close()
    report = channel.report().total
    assert (report.errors, report.calls) == (2, 0), "each call that timed out is counted once"


def test_a_future_that_nobody_holds_lets_its_tensors_go_at_once(channel: Channel) -> None:
    """Without the collector: call and future do not keep each other alive."""
    double = channel.bind("double")
    before = channel.memory.arena.occupancy().blocks
    gc.collect()
    gc.disable()
    try:
        for kind in ("result", "callback", "waited for"):
            future = double.submit(torch.ones(100))
            if kind == "callback":
                future.add_done_callback(lambda future: None)
            elif kind == "waited for":
                concurrent.futures.wait([future], 10)
            assert future.result().sum() == 200
            del future
        wait_until(lambda: channel.memory.arena.occupancy().blocks == before)  # the background thread has to see it too
    finally:
        gc.enable()


def test_a_callback_may_make_calls_and_wait_for_them(channel: Channel) -> None:
    """C5: whoever takes completions is not held up by what is done with them."""
    double = channel.bind("double")
    outcomes: list[float] = []
    done = threading.Event()

    def call_again(future: concurrent.futures.Future[torch.Tensor]) -> None:
        outcomes.append(double(future.result()).sum().item())
        outcomes.append(double.submit(future.result()).result(300).sum().item())
        done.set()

    for ask in (lambda future: done.wait(300), lambda future: future.result(300)):
        done.clear()
        future = double.submit(torch.ones(4))
        future.add_done_callback(call_again)
        ask(future)
        assert done.wait(300)
    assert outcomes == [16.0] * 4
