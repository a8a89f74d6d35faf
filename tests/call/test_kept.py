"""Results that stay with the worker: handles of them, between real processes, on all lanes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

import shmbroker
from shmbroker.arena.room import room_for
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.plan import Plan
from shmbroker.call.statistics import OpStatistics
from shmbroker.client.channel import Channel
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.outputs import Outputs
from shmbroker.memory.layout import Space
from tests.processes import worker_process

LIMIT = 1 << 20
HALF = (LIMIT // 8,)
"""Of float32: as many elements as take half of the limit."""


@pytest.fixture(scope="module")
def small_keeper(broker: shmbroker.LocalBroker) -> Iterator[str]:
    """A worker that keeps 1 MiB for each channel."""
    with worker_process("keeper", KEPT_BYTES=str(LIMIT)):
        yield "keeper"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_kept_result_is_an_input_of_later_calls(channel: Channel, dtype: torch.dtype) -> None:
    contiguous = channel.bind("contiguous")
    x = torch.arange(12).reshape(3, 4).to(dtype)
    kept = contiguous.keep(x.t())
    assert isinstance(kept, shmbroker.Kept)
    assert (kept.shape, kept.dtype) == ((4, 3), dtype)
    again = contiguous.keep(kept)
    del kept
    assert torch.equal(contiguous(again), x.t())
    assert torch.equal(again.fetch(), x.t())


def test_kept_and_handed_tensors_go_together(channel: Channel) -> None:
    split, add = channel.bind("split_in_two"), channel.bind("add")
    first, second = split.keep(torch.arange(6.0))
    assert add(first, term=1.0).tolist() == [1, 2, 3]
    assert add.submit(second, term=2.0).result().tolist() == [5, 6, 7]
    step = add.capture(second)
    assert step.replay().tolist() == step.replay().tolist() == [3, 4, 5]
    report = channel.report()
    assert report.total.sent_bytes == 24, "what is kept does not travel"


def test_it_takes_no_room_in_the_arena(channel: Channel, client: shmbroker.Client) -> None:
    kept = channel.bind("double").keep(client.empty((1 << 20,)).fill_(3.0))
    gc.collect()
    assert client.arena.occupancy().held_bytes == 0
    assert channel.bind("total")(kept).item() == 6 << 20


def test_it_is_freed_with_its_handle(client: shmbroker.Client, small_keeper: str) -> None:
    for lane in ("shm", "zmq"):
        double = client.channel(small_keeper, lane=lane).bind("double")
        kept = [double.keep(torch.ones(HALF)), double.keep(torch.ones(HALF))]
        with pytest.raises(shmbroker.BadFrame, match="this worker keeps at most 1048576: free some first"):
            double.keep(torch.ones(1))
        kept.pop()
        kept.append(double.keep(torch.full(HALF, 4.0)))
        assert kept[1].fetch()[-1] == 8
        kept[0].free()
        kept[0].free()
        third = double.keep(torch.ones(HALF))
        assert third.fetch()[0] == 2
        with pytest.raises(shmbroker.BadInput, match="was freed"):
            double(kept[0])
        with pytest.raises(shmbroker.BadInput, match="was freed"):
            kept[0].fetch()


def test_a_hundred_handles_are_let_go_at_once(client: shmbroker.Client, small_keeper: str) -> None:
    double = client.channel(small_keeper).bind("double")
    for _ in range(3):
        kept = [double.keep(torch.ones(LIMIT // 512)) for _ in range(100)]
        assert kept[99].fetch().sum() == LIMIT // 256
        del kept


def test_it_ends_with_the_channel(client: shmbroker.Client, small_keeper: str) -> None:
    for _ in range(3):
        channel = client.channel(small_keeper)
        kept = channel.bind("double").keep(torch.ones((LIMIT // 4,)))
        channel.close()
        with pytest.raises(shmbroker.ChannelError):
            kept.fetch()


def test_it_is_refused_on_another_channel(client: shmbroker.Client, worker: int) -> None:
    one, other = client.channel("test"), client.channel("test")
    kept = one.bind("double").keep(torch.ones(2))
    with pytest.raises(shmbroker.BadInput, match="lies with the worker of its own channel"):
        other.bind("double")(kept)


def test_a_call_that_fails_keeps_nothing(client: shmbroker.Client, small_keeper: str) -> None:
    channel = client.channel(small_keeper)
    fail, double = channel.bind("fail"), channel.bind("double")
    for _ in range(4):
        with pytest.raises(shmbroker.RemoteOpError, match="no such luck"):
            fail.keep(torch.ones(HALF))
    assert double.keep(torch.ones(HALF)).fetch()[0] == 2


def test_a_handle_keeps_nothing_of_the_client_alive(channel: Channel, client: shmbroker.Client) -> None:
    x = client.empty((4,)).fill_(1.0)
    died = weakref.ref(x.untyped_storage())
    kept = channel.bind("double").keep(x)
    del x
    gc.collect()
    assert died() is None or client.arena.occupancy().held_bytes == 0
    assert kept.fetch().tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("inputs", "outputs", "spaces", "numbers", "complaint"),
    [
        ([(4,)], [(4,)], [Space.KEPT, Space.SEGMENT], [99], "no kept tensor 99 is on this channel"),
        ([(5,)], [(5,)], [Space.KEPT, Space.SEGMENT], [None], "is float32"),
        ([(4,)], [(4,)], [Space.KEPT, Space.KEPT], [None, None], "is on this channel already"),
        ([(4,)], [(4,)], [Space.DEVICE, Space.SEGMENT], [0], "this client has opened none here"),
        ([(1 << 40,)], [(1 << 40,)], [Space.KEPT, Space.KEPT], [None, 77], "has a shape|is float32"),
    ],
    ids=["unknown", "another form", "twice", "no device arena", "more than there is"],
)
def test_hostile_frames_about_kept_tensors_are_refused_and_the_worker_lives(
    client: shmbroker.Client,
    worker: int,
    inputs: list[tuple[int, ...]],
    outputs: list[tuple[int, ...]],
    spaces: list[int],
    numbers: list[int | None],
    complaint: str,
) -> None:
    channel = client.channel("test")
    double = channel.bind("add")
    kept = double.keep(torch.ones(4))
    places = [client.arena.place(room_for(torch.Size((4,)), torch.float32)) for _ in ("input", "output")]
    offsets, generations = [block.offset for _, block in places], [block.generation for _, block in places]
    spec = shmbroker.TensorSpec((4,), torch.float32)
    plan = Plan(channel.pair, OpStatistics("add"), double.op_id, [torch.ones(4)], Outputs((spec,), True), b"")
    plan.template = FrameTemplate(
        double.op_id,
        [(shmbroker.TensorSpec(shape, torch.float32), (1,)) for shape in inputs],
        [(shmbroker.TensorSpec(shape, torch.float32), (1,)) for shape in outputs],
        b"",
        spaces,
    )
    for index, number in enumerate(numbers):
        offsets[index] = kept.number if number is None else number
    call = Call(plan, (), (), clock_ns(), 0, ())
    channel.pair.submit(call, plan.template, offsets, generations)
    with pytest.raises(shmbroker.BadFrame, match=complaint):
        double.wait(call)
    assert kept.fetch().tolist() == [1, 1, 1, 1]
