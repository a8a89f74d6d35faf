"""Channels: ops are bound with what can be bound, and a channel that is closed takes no other with it."""

from __future__ import annotations

import threading

import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.client.channel import Channel


def same(x: TensorSpec) -> TensorSpec:
    return x


def test_an_unknown_op_or_argument_is_told_at_bind(channel: Channel) -> None:
    with pytest.raises(shmbroker.BadInput, match="has no op 'nope'; it has: double"):
        channel.bind("nope")
    with pytest.raises(shmbroker.BadInput, match="unexpected keyword argument 'columns'"):
        channel.bind("table", columns=3)
    with pytest.raises(shmbroker.ShmBrokerError, match="2000 rows are too many"):
        channel.bind("table", rows=2000)


def test_arguments_that_cannot_travel_are_told_by_name_of_the_op(channel: Channel) -> None:
    with pytest.raises(shmbroker.BadInput, match="op 'scale': static arguments are numbers"):
        channel.bind("scale", factor=torch.ones(1))
    with pytest.raises(shmbroker.BadInput, match="op 'add': a call's own arguments are numbers"):
        channel.bind("add", out_spec=same)(torch.ones(1), term=torch.ones(1))
    with pytest.raises(shmbroker.BadInput, match="named by a string"):
        channel.bind(None)  # type: ignore[arg-type]


def test_closing_a_channel_fails_what_others_wait_for_on_it_and_disturbs_no_other(client: shmbroker.Client, channel: Channel) -> None:
    other = client.channel("test")
    double = other.bind("double")
    assert double(torch.ones(1)).item() == 2.0
    slow = channel.bind("sleep", seconds=1.0)
    errors: list[BaseException] = []
    begun = threading.Event()

    def call() -> None:
        begun.set()
        try:
            slow(torch.ones(1))
        except shmbroker.WorkerLost as error:
            errors.append(error)

    waiting = threading.Thread(target=call)
    waiting.start()
    begun.wait()
    while not channel.outstanding:
        pass
    channel.close()
    waiting.join()
    assert "the channel was closed" in str(errors[0])
    channel.close()
    assert double(torch.ones(1)).item() == 2.0
