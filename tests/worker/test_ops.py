"""Ops as a worker runs them, whatever they do: to their inputs, to their room, to the worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.client.channel import Channel
from tests.peers import LANES
from tests.processes import worker_process


@pytest.fixture(scope="module")
def calling() -> Iterator[shmbroker.Client]:
    """A client, and a worker in a process of its own."""
    with shmbroker.local_broker(), worker_process(), shmbroker.connect(arena="64M", place_timeout=1.0) as client:
        yield client


@pytest.fixture(params=LANES, ids=["shm-sem", "shm-poll", "zmq"])
def channel(request: pytest.FixtureRequest, calling: shmbroker.Client) -> Iterator[Channel]:
    lane, doorbell = request.param
    channel = calling.channel("test", lane=lane, doorbell=doorbell)
    yield channel
    channel.close()


def same(x: TensorSpec) -> TensorSpec:
    return x


def test_an_error_of_the_op_comes_back_with_its_type_and_text(channel: Channel) -> None:
    with pytest.raises(shmbroker.RemoteOpError, match="op 'fail' failed on worker 'test-worker': ValueError: no such luck") as caught:
        channel.bind("fail", out_spec=same)(torch.ones(1))
    assert caught.value.type_name == "ValueError"
    assert channel.bind("double")(torch.ones(1)).item() == 2.0, "the channel goes on"


def test_room_that_does_not_fit_what_the_op_writes_is_rejected_by_the_worker(channel: Channel) -> None:
    wrong = channel.bind("scale", out_spec=lambda x, factor: TensorSpec((1,), x.dtype), factor=2.0)
    with pytest.raises(shmbroker.BadFrame, match=r"writes float32\[4\], the frame has room for float32\[1\]"):
        wrong(torch.ones(4))


def test_an_op_that_changes_its_input_is_given_the_true_one_each_time(channel: Channel, calling: shmbroker.Client) -> None:
    """A worker recognises a frame that it has checked before, and keeps its tensors: not those that an op has turned round."""
    turned = channel.bind("turn_in_place", out_spec=lambda x: TensorSpec((2,), torch.int64))
    x = calling.empty((3, 4)).fill_(1.0)
    for _ in range(3):
        assert turned(x).tolist() == [4, 3]


def test_an_op_that_tries_to_end_the_worker_or_cannot_tell_its_error_fails_its_call_alone(channel: Channel) -> None:
    x = torch.ones(1)
    with pytest.raises(shmbroker.RemoteOpError, match="SystemExit: 3"):
        channel.bind("leave", out_spec=same)(x)
    with pytest.raises(shmbroker.ShmBrokerError, match="SystemExit: 3"):
        channel.bind("leave_untried")(x)
    with pytest.raises(shmbroker.RemoteOpError, match=r"Unspeakable: \(its text cannot be told\)"):
        channel.bind("unspeakable", out_spec=same)(x)
    with pytest.raises(shmbroker.BadInput, match="returned NoneType: an op returns a tensor or a tuple of tensors"):
        channel.bind("nothing")(x)
    assert channel.bind("double")(x).item() == 2.0


def test_an_op_without_an_out_spec_runs_once_a_call_and_takes_arguments(channel: Channel) -> None:
    count = channel.bind("count_runs")
    first = count(torch.zeros(1)).item()
    assert count(torch.zeros(1)).item() == first + 1
    assert count(torch.zeros(1), step=10).item() == first + 11
    assert count(torch.zeros(1)).item() == first + 12
