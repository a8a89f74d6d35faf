"""A call owns the blocks that its frame names, whatever becomes of the tensors (A5), and a captured tensor that was moved is told."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp

import shmbroker
from shmbroker import BadInput
from shmbroker.client import channel as channels
from shmbroker.client.channel import Channel
from tests.processes import submissions_taken, wait_until, worker_process

Move = Callable[[torch.Tensor], object]


def through_a_queue(tensor: torch.Tensor) -> None:
    """As a program does that shows a tensor to another process."""
    queue = mp.get_context("fork").SimpleQueue()
    queue.put(tensor)
    queue.get()


MOVES: dict[str, Move] = {
    "share_memory_": lambda tensor: tensor.share_memory_(),
    "a multiprocessing queue": through_a_queue,
    "set_": lambda tensor: tensor.set_(torch.zeros_like(tensor)),
    "data": lambda tensor: setattr(tensor, "data", torch.zeros_like(tensor)),
    "storage": lambda tensor: tensor.untyped_storage().share_memory_(),
    "share_memory_ of a view": lambda tensor: tensor[1:].share_memory_(),
}

moves = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())


def crowd(channel: Channel, like: torch.Tensor, value: float) -> list[torch.Tensor]:
    """Tensors of others: as many as there are blocks of that size that could be taken by mistake."""
    return [channel.memory.empty(tuple(like.shape)).fill_(value) for _ in range(16)]


def untouched(others: list[torch.Tensor], value: float) -> bool:
    return all(bool((other == value).all()) for other in others)


@moves
def test_a_call_on_its_way_reads_what_it_was_given_though_the_tensor_is_moved(channel: Channel, move: Move) -> None:
    """A5."""
    sleep = channel.bind("sleep", seconds=0.3)
    b = channel.memory.empty((1024,)).fill_(3.0)
    future = sleep.submit(b)
    move(b)
    others = crowd(channel, b, -1.0)
    assert future.result().tolist() == [3.0] * 1024
    assert untouched(others, -1.0)


@moves
def test_a_capture_keeps_its_blocks_and_tells_of_an_input_that_was_moved(channel: Channel, move: Move) -> None:
    """A5."""
    a = channel.memory.empty((1024,)).fill_(1.0)
    step = channel.bind("double").capture(a)
    assert step.replay()[0].item() == 2.0
    move(step.inputs[0])
    others = crowd(channel, a, -7.0)
    for replay in (step.replay, step.submit):
        with pytest.raises(BadInput, match=r"captured input 0 does not lie where it lay .* capture anew"):
            replay()
    assert untouched(others, -7.0)


@moves
def test_a_capture_tells_of_an_output_that_was_moved_and_writes_into_nobodys_tensor(channel: Channel, move: Move) -> None:
    a = channel.memory.empty((1024,)).fill_(1.0)
    step = channel.bind("double").capture(a)
    step.replay()
    move(step.outputs[0])
    others = crowd(channel, a, -7.0)
    with pytest.raises(BadInput, match="captured output 0 does not lie where it lay"):
        step.replay()
    future = step.submit()
    with pytest.raises(BadInput, match="captured output 0 does not lie where it lay"):
        future.result()
    assert untouched(others, -7.0)


def test_an_output_that_is_moved_while_its_call_is_on_its_way_is_told(channel: Channel) -> None:
    a = channel.memory.empty((1024,)).fill_(1.0)
    step = channel.bind("sleep", seconds=0.3).capture(a)
    future = step.submit()
    step.outputs[0].share_memory_()
    with pytest.raises(BadInput, match="captured output 0 does not lie where it lay"):
        future.result()


@pytest.mark.usefixtures("without_gc")
def test_blocks_are_free_again_when_call_and_capture_have_ended(channel: Channel, client: shmbroker.Client) -> None:
    double = channel.bind("double")
    b = client.empty((1024,)).fill_(3.0)
    step = double.capture(b)
    step.replay()
    for tensor in (*step.inputs, *step.outputs):
        tensor.share_memory_()
    del tensor
    crowd(channel, b, 0.0)
    assert client.arena.occupancy().blocks == 2
    del step, b
    assert client.arena.occupancy().blocks == 0
    moved = client.empty((1024,)).fill_(3.0)
    future = double.submit(moved)
    moved.share_memory_()
    assert future.result().sum().item() == 6.0 * 1024
    del future
    assert client.arena.occupancy().blocks == 0


def test_who_closes_a_channel_waits_for_its_running_call_and_nobodys_tensor_is_written(client: shmbroker.Client, channel: Channel) -> None:
    """A5, of a call that nobody waits for any more."""
    sleep = channel.bind("sleep", seconds=0.4)
    b = client.empty((1024,)).fill_(3.0)
    sleep(b)
    future = sleep.submit(b)
    taken = channel.lane != "shm"
    wait_until(lambda: taken or submissions_taken(channel) == 2)
    channel.close()
    with pytest.raises(shmbroker.WorkerLost, match="the channel was closed before it answered"):
        future.result()
    del future, b
    others = [client.empty((1024,)).fill_(-index) for index in range(64)]
    time.sleep(0.8)  # it would be over by then
    assert all(bool((other == -index).all()) for index, other in enumerate(others))
    del others
    assert client.arena.occupancy().blocks == 0


def test_a_call_that_outlasts_its_closed_channel_keeps_blocks_and_area_until_its_worker_ends(
    broker: shmbroker.LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5."""
    monkeypatch.setattr(channels, "CLOSING_SECONDS", 0.2)
    with worker_process("slow") as process, shmbroker.connect(arena="1M", channels=2) as client:
        channel = client.channel("slow")
        sleep = channel.bind("sleep", seconds=3600.0)
        future = sleep.submit(client.empty((1024,)).fill_(3.0))
        wait_until(lambda: submissions_taken(channel) == 1)
        channel.close()
        with pytest.raises(shmbroker.WorkerLost):
            future.result()
        del future
        assert client.arena.occupancy().blocks == 2
        other = client.channel("slow")
        assert other.index != channel.index, "its queues may still be written to"
        with pytest.raises(
            shmbroker.ChannelError, match="all 2 channels of this client are open, 1 of them closed over a call that still runs: close one"
        ):
            client.channel("slow")
        process.kill()
        wait_until(lambda: client.arena.occupancy().blocks == 0)
        other.close()
    with worker_process("slow") as process, shmbroker.connect(arena="1M", channels=1) as client:
        client.channel("slow").close()
        client.channel("slow").close()


def test_what_a_caller_does_with_an_input_meanwhile_is_not_taken_for_the_ops_doing(channel: Channel) -> None:
    sleep = channel.bind("sleep", seconds=0.3)
    b = channel.memory.empty((1024,)).fill_(3.0)
    future = sleep.submit(b)  # the first call of its kind: on a copy
    wait_until(lambda: channel.lane != "shm" or submissions_taken(channel) == 1)
    b.fill_(4.0)
    assert future.result().shape == (1024,)
