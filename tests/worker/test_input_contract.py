"""What an op may do with its inputs: read them, until the call ends. Whatever else is told by name, or was declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import shmbroker
from shmbroker import BadInput, RemoteOpError
from shmbroker.client.channel import Channel
from tests.peers import LANES
from tests.processes import worker_process


@pytest.fixture(scope="module")
def calling() -> Iterator[shmbroker.Client]:
    """A client, and a worker in a process of its own."""
    with shmbroker.local_broker(), worker_process(), shmbroker.connect(arena="64M", place_timeout=1.0) as client:
        yield client


@pytest.fixture(params=LANES[::2], ids=["shm", "zmq"])
def channel(request: pytest.FixtureRequest, calling: shmbroker.Client) -> Iterator[Channel]:
    lane, doorbell = request.param
    channel = calling.channel("test", lane=lane, doorbell=doorbell)
    yield channel
    channel.close()


Made = Callable[[Channel, torch.Tensor], torch.Tensor]

WHERE: dict[str, Made] = {
    "in the arena": lambda channel, x: channel.memory.copy_in(x),
    "a view in the arena": lambda channel, x: channel.memory.copy_in(torch.cat([x, x]))[len(x) :],
    "outside": lambda channel, x: x.clone(),
}

where = pytest.mark.parametrize("made", WHERE.values(), ids=WHERE.keys())


@where
@pytest.mark.parametrize("op", ["write", "write_into_a_view", "write_by_numpy"])
def test_an_op_that_writes_into_an_input_is_told_so_and_the_caller_keeps_its_values(channel: Channel, made: Made, op: str) -> None:
    x = made(channel, torch.tensor([-1.0, -2.0]))
    write = channel.bind(op)
    for _ in range(3):
        with pytest.raises(RemoteOpError, match=f"op '{op}' wrote into input 0: .* copies_inputs=True, .* in_place=True"):
            write(x)
    assert x.tolist() == [-1.0, -2.0]


def test_an_op_that_writes_only_now_and_then_is_told_when_it_does(channel: Channel) -> None:
    x = channel.memory.copy_in(torch.ones(4))
    op = channel.bind("write_later")
    for _ in range(3):
        assert op(x).tolist() == [1.0] * 4
    with pytest.raises(RemoteOpError, match="op 'write_later' wrote into input 0"):
        op(x, now=True)


@pytest.mark.parametrize("how", ["itself", "view", "detached", "numpy", "storage", "memoryview", "capsule", "in a tuple", "closure"])
def test_an_op_that_keeps_an_input_is_told_so(channel: Channel, how: str) -> None:
    remember = channel.bind("remember")
    x = channel.memory.copy_in(torch.ones(4))
    for _ in range(2):
        with pytest.raises(RemoteOpError, match=r"op 'remember' kept input 0, or a view of it: .* clone\(\), or .* copies_inputs=True"):
            remember(x, how=how)
    if how in ("storage", "capsule"):  # seen by the closer look at the first call of a kind, and not later
        return
    for _ in range(3):
        assert remember(x, how="nothing").tolist() == [1.0] * 4
    with pytest.raises(RemoteOpError, match="op 'remember' kept input 0"):
        remember(x, how=how)


@where
def test_an_op_with_copies_of_its_inputs_keeps_them_and_writes_into_them(channel: Channel, made: Made) -> None:
    remember, recall = channel.bind("remember_copy"), channel.bind("recall")
    for value in (1.0, 2.0, 3.0):
        remember(made(channel, torch.full((256,), value)))
    assert recall(torch.zeros(1)).tolist() == [1.0, 2.0, 3.0]
    x = made(channel, torch.tensor([-1.0, 2.0]))
    assert channel.bind("relu_of_its_copy")(x).tolist() == [0.0, 2.0]
    assert x.tolist() == [-1.0, 2.0]


@where
def test_what_an_op_writes_in_place_is_its_callers_wherever_the_tensor_lies(channel: Channel, made: Made) -> None:
    relu = channel.bind("relu_")
    for call in (relu, lambda x: relu.submit(x).result()):
        for _ in range(3):
            x = made(channel, torch.tensor([-1.0, 2.0]))
            assert call(x).tolist() == [0.0, 2.0]
            assert x.tolist() == [0.0, 2.0]


def test_in_place_works_on_parameters_strided_tensors_and_those_of_inference_mode(channel: Channel) -> None:
    relu = channel.bind("relu_")
    wide = torch.full((4, 3), -1.0)
    relu(wide.T[::2])
    assert wide.tolist() == [[0.0, -1.0, 0.0]] * 4
    parameter = torch.nn.Parameter(torch.tensor([-1.0, 3.0]))
    with torch.no_grad():
        relu(parameter)
    assert parameter.tolist() == [0.0, 3.0]
    with torch.inference_mode():
        made = torch.tensor([-1.0, 4.0])
        relu(made)
        assert made.tolist() == [0.0, 4.0]


def test_two_inputs_are_both_written(channel: Channel) -> None:
    swap = channel.bind("swap")
    for first, second in (
        (torch.zeros(3), torch.ones(3)),
        (channel.memory.copy_in(torch.zeros(3)), torch.ones(3)),
        (torch.zeros(3), channel.memory.copy_in(torch.ones(3))),
    ):
        swap(first, second)
        assert (first.tolist(), second.tolist()) == ([1.0] * 3, [0.0] * 3)
    halves = torch.tensor([0.0, 0.0, 1.0, 1.0])
    swap(halves[:2], halves[2:])
    assert halves.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_what_cannot_be_written_back_is_refused_before_the_call(channel: Channel, calling: shmbroker.Client) -> None:
    relu, swap = channel.bind("relu_"), channel.bind("swap")
    x = torch.tensor([-1.0, 2.0])
    for what, call in {
        "give a torch tensor": lambda: relu(np.array([-1.0, 2.0], np.float32)),
        "elements that share memory": lambda: relu(torch.tensor([-1.0]).expand(4)),
        "shares memory with another input": lambda: swap(x, x),
    }.items():
        with pytest.raises(BadInput, match=what):
            call()
    swap(*[calling.copy_in(x)] * 2)
    assert calling.arena.occupancy().blocks == 0
    assert channel.pair.outstanding == 0


def test_a_call_in_place_that_failed_changes_nothing_outside(channel: Channel) -> None:
    x = torch.tensor([-1.0, 2.0])
    with pytest.raises(RemoteOpError, match="half way"):
        channel.bind("zero_and_fail")(x)
    assert x.tolist() == [-1.0, 2.0]


def test_a_tensor_that_changed_its_shape_meanwhile_is_told(channel: Channel) -> None:
    x = torch.tensor([-1.0, 2.0])
    future = channel.bind("relu_").submit(x)
    x.resize_(3)
    with pytest.raises((BadInput,), match="cannot be copied back"):
        future.result()


def test_an_op_in_place_cannot_be_bound_where_it_would_be_run_twice(calling: shmbroker.Client) -> None:
    with pytest.raises(BadInput, match=r"'relu_' works in place: .* client\.channel"):
        calling.failover_channel("test").bind("relu_")


def test_reference_cycles_and_returned_inputs_are_no_breach(channel: Channel) -> None:
    x = channel.memory.copy_in(torch.ones(2))
    for name, expected in (("in_a_cycle", 2.0), ("give_back", 1.0)):
        op = channel.bind(name)
        for _ in range(3):
            assert op(x).tolist() == [expected] * 2


def test_a_kept_tensor_that_is_an_input_is_not_written_either(channel: Channel) -> None:
    kept = channel.bind("double").keep(torch.tensor([-1.0, 1.0]))
    with pytest.raises(RemoteOpError, match="op 'write' wrote into input 0"):
        channel.bind("write")(kept)


def test_copies_and_in_place_together_are_refused() -> None:
    worker = shmbroker.Worker("none")
    with pytest.raises(BadInput, match="choose one"):
        worker.op("both", copies_inputs=True, in_place=True)(lambda x: x)


def test_gradients_are_not_recorded_while_an_op_runs_unless_it_says_so(channel: Channel) -> None:
    assert channel.bind("records_gradients")(torch.ones(2)).tolist() == [False, True]
