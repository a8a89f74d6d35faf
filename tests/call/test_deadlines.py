"""Deadlines of calls: who waits is told in time, and a late answer is mixed up with nothing."""

from __future__ import annotations

import threading

import pytest
import torch

import shmbroker
from shmbroker.client.channel import Channel


def test_a_call_past_its_deadline_raises_and_its_late_completion_is_dropped(channel: Channel, client: shmbroker.Client) -> None:
    slow = channel.bind("sleep", seconds=0.5)
    with pytest.raises(shmbroker.CallTimeout, match=r"op 'sleep', call \d+: no completion after 0\.\d+ s from worker 'test-worker'"):
        slow(torch.ones(3), timeout=0.1)
    assert channel.outstanding == 1, "its blocks stay held until the worker is done"
    assert channel.bind("double")(torch.ones(1)).item() == 2.0, "the next call waits its turn and is not mixed up"
    assert channel.outstanding == 0


@pytest.mark.parametrize("timeout", [0, -1.0, -1e10, float("nan")])
def test_a_timeout_that_is_none_is_refused_and_nothing_is_left_outstanding(channel: Channel, timeout: float) -> None:
    op = channel.bind("double")
    with pytest.raises(shmbroker.BadInput, match="must be a positive number of seconds"):
        op(torch.ones(1), timeout=timeout)
    assert op(torch.ones(1), timeout=1e30).item() == 2.0
    assert channel.outstanding == 0


def test_a_deadline_holds_whoever_else_waits_on_the_channel(channel: Channel) -> None:
    slow, quick = channel.bind("sleep", seconds=1.0), channel.bind("double")
    quick(torch.ones(1))
    waiting = threading.Thread(target=lambda: slow(torch.ones(1)))
    waiting.start()
    while not channel.outstanding:
        pass
    try:
        with pytest.raises(shmbroker.CallTimeout):
            quick(torch.ones(1), timeout=0.1)
        assert waiting.is_alive(), "raised at its own deadline, not when the other's call was done"
    finally:
        waiting.join()
