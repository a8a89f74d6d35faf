"""Calls between two real processes, on both lanes and with both doorbells."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmbroker
from shmbroker import BadInput, TensorSpec
from shmbroker.arena.spec import DTYPE_NAMED
from shmbroker.client.channel import Channel


def same(x: TensorSpec) -> TensorSpec:
    return x


def test_a_call_returns_what_the_op_returned(channel: Channel) -> None:
    x = torch.randn(3, 5)
    assert torch.equal(channel.bind("double")(x), x * 2)


def test_an_op_with_several_results_returns_a_tuple(channel: Channel) -> None:
    first, second = channel.bind("split_in_two")(torch.arange(10))
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [5, 6, 7, 8, 9]


def test_static_arguments_are_fixed_at_bind_and_call_arguments_travel_in_the_frame(channel: Channel) -> None:
    x = torch.ones(4)
    assert channel.bind("scale", factor=3.0)(x).tolist() == [3.0] * 4
    add = channel.bind("add", out_spec=same)
    assert add(x).tolist() == [1.0] * 4
    assert add(x, term=2.5).tolist() == [3.5] * 4
    assert channel.bind("table", rows=3)(x).shape == (3, 4)


@pytest.mark.parametrize("dtype", DTYPE_NAMED.values(), ids=DTYPE_NAMED.keys())
def test_every_dtype_arrives_bit_for_bit(channel: Channel, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2 if dtype is torch.bool else 120, (7, 9), dtype=torch.uint8).view(torch.uint8)
    x = x.to(torch.bool) if dtype is torch.bool else x.repeat(1, dtype.itemsize).view(dtype)
    y = channel.bind("contiguous", out_spec=same)(x)
    assert y.dtype is dtype
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_strided_views_of_any_shape_arrive_without_being_made_contiguous(channel: Channel, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    order = data.draw(st.permutations(range(len(shape))))
    memory = channel.memory
    x = memory.empty([size * 2 for size in shape] if len(shape) < 5 else shape, torch.int32)
    x.copy_(torch.arange(x.numel()).view(x.shape))
    view = x.permute(order)
    for dimension in range(view.dim()):
        if data.draw(st.booleans()):
            view = view.narrow(dimension, view.shape[dimension] // 2, view.shape[dimension] - view.shape[dimension] // 2)
    copied = channel.report().total.copied_bytes
    assert torch.equal(channel.bind("contiguous", out_spec=same)(view), view)
    assert channel.report().total.copied_bytes == copied


def test_scalars_and_empty_tensors_are_tensors_too(channel: Channel) -> None:
    op = channel.bind("contiguous", out_spec=same)
    assert op(torch.tensor(2.5)).item() == 2.5
    assert op(torch.empty(0, 3)).shape == (0, 3)


def test_numpy_arrays_are_taken(channel: Channel) -> None:
    assert channel.bind("double")(np.arange(3.0)).tolist() == [0.0, 2.0, 4.0]


def test_an_input_in_the_arena_is_not_copied_and_one_outside_is_copied_once(channel: Channel, client: shmbroker.Client) -> None:
    op = channel.bind("contiguous", out_spec=same)
    inside = client.empty((1024,)).fill_(1.0)
    op(inside)
    op(inside[100:200])
    assert channel.report().total.copied_bytes == 0
    op(torch.ones(1000))
    report = channel.report().total
    assert report.copied_bytes == 4000
    assert report.sent_bytes == 4096 + 400 + 4000
    assert report.received_bytes == report.sent_bytes


def test_an_output_is_the_block_that_the_worker_wrote_and_can_be_the_next_input(channel: Channel, client: shmbroker.Client) -> None:
    op = channel.bind("double")
    y = op(torch.ones(5))
    assert client.holds(y)
    z = op(y)
    assert z.tolist() == [4.0] * 5
    assert channel.report().total.copied_bytes == 20, "only the first input lay outside"


def test_the_worker_reads_the_very_memory_that_the_client_wrote(channel: Channel, client: shmbroker.Client) -> None:
    address = channel.bind("address", out_spec=lambda x: TensorSpec((1,), torch.int64))
    block = client.empty((1000,))
    address(block)  # an op is tried out on copies first
    base = int(address(block).item())
    assert int(address(block[10:]).item()) == base + 40
    assert int(address(block).item()) == base, "the same block lies at the same place in the worker, call after call"


def test_no_tensor_bytes_go_over_a_socket(channel: Channel) -> None:
    op = channel.bind("contiguous", out_spec=same)
    big = torch.zeros(1 << 20)
    op(big)
    report = channel.report()
    assert report.total.sent_bytes == big.nbytes
    if channel.lane == "shm":
        assert report.socket_bytes == 0
    else:
        assert 0 < report.socket_bytes < 4096, "a frame each way"


def test_more_calls_than_slots_are_submitted_by_waiting_for_free_ones(channel: Channel) -> None:
    op = channel.bind("contiguous", out_spec=same)
    futures = [op.submit(torch.tensor([number])) for number in range(500)]
    assert [future.result().item() for future in futures] == list(range(500))


def test_a_captured_call_replays_on_the_same_blocks(channel: Channel) -> None:
    captured = channel.bind("scale", factor=10.0).capture(torch.zeros(4))
    for number in range(5):
        captured.inputs[0].fill_(number)
        y = captured.replay()
        assert y.data_ptr() == captured.outputs[0].data_ptr()
        assert y.tolist() == [10.0 * number] * 4
    assert captured.submit().result().tolist() == [40.0] * 4


def test_several_threads_call_on_one_channel(channel: Channel) -> None:
    op = channel.bind("scale", factor=2.0)
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(50):
            value = float(number * 1000 + turn)
            if op(torch.full((64,), value)).tolist() != [2 * value] * 64:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert not wrong


def test_results_stay_valid_while_they_are_held_and_their_blocks_return_afterwards(channel: Channel, client: shmbroker.Client) -> None:
    op = channel.bind("scale", factor=1.0)
    gc.collect()
    before = client.arena.occupancy().held_bytes
    held = [op(torch.full((1 << 16,), float(number))) for number in range(40)]
    for number, tensor in enumerate(held):
        assert bool((tensor == number).all())
    del held, tensor
    gc.collect()
    assert client.arena.occupancy().held_bytes == before


def test_what_no_frame_can_carry_is_told_before_anything_is_sent(channel: Channel, client: shmbroker.Client) -> None:
    op = channel.bind("contiguous", out_spec=same)
    for bad, text in [
        (torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1), "9 dimensions"),
        (torch.zeros(2, dtype=torch.float8_e4m3fnuz), "float8_e4m3fnuz cannot be handed over"),
        (torch.zeros(2, device="meta"), "has no bytes"),
        (torch.eye(2).to_sparse(), "has no bytes"),
        ("a word", "cannot be handed over"),
    ]:
        with pytest.raises(shmbroker.BadInput, match=text):
            op(bad)  # type: ignore[arg-type]
    with pytest.raises(shmbroker.BadInput, match="at most 12"):
        channel.bind("contiguous", out_spec=lambda *inputs: inputs[0])(*[torch.zeros(1)] * 13)
    with pytest.raises(shmbroker.BadInput, match="bind them instead"):
        op(torch.zeros(1), text="x" * 200)
    assert channel.outstanding == 0


def test_a_tensor_that_requires_grad_can_be_handed_over_where_no_gradient_is_recorded(channel: Channel) -> None:
    double = channel.bind("double")
    with torch.no_grad():
        assert double(torch.ones(2, requires_grad=True)).tolist() == [2.0, 2.0]
    with torch.inference_mode():
        assert double(torch.ones(2, requires_grad=True)).tolist() == [2.0, 2.0]
    assert double(torch.ones(2, requires_grad=True).detach()).tolist() == [2.0, 2.0]


INPUTS_OF_A_GRADIENT: dict[str, Callable[[Channel], torch.Tensor]] = {
    "outside": lambda channel: torch.ones(2, requires_grad=True),
    "computed": lambda channel: torch.ones(2, requires_grad=True) * 3,
    "in the arena": lambda channel: channel.memory.empty((2,)).fill_(1).requires_grad_(),
    "a view in the arena": lambda channel: channel.memory.empty((4,)).fill_(1).requires_grad_()[2:],
    "written to the arena": lambda channel: channel.memory.empty((2,)).copy_(torch.ones(2, requires_grad=True)),
    "a parameter": lambda channel: torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("made", INPUTS_OF_A_GRADIENT.values(), ids=INPUTS_OF_A_GRADIENT.keys())
def test_an_input_whose_gradient_would_be_lost_is_refused_with_the_way_out(
    channel: Channel, made: Callable[[Channel], torch.Tensor]
) -> None:
    add = channel.bind("double")
    x = made(channel)
    for call in (add, add.submit, add.keep, add.capture):
        with pytest.raises(BadInput, match=r"op 'double': input 0 requires grad, .* torch\.no_grad\(\), .* detach\(\)"):
            call(x)
    assert channel.pair.outstanding == 0


def test_a_captured_input_that_comes_to_want_a_gradient_is_refused(channel: Channel) -> None:
    x = channel.memory.empty((2,)).fill_(1.0)
    step = channel.bind("double").capture(x)
    x.requires_grad_()
    with pytest.raises(BadInput, match="captured input 0 requires grad"):
        step.replay()
    with torch.no_grad():
        assert step.replay().tolist() == [2.0, 2.0]


def test_a_copy_whose_gradient_would_be_lost_is_refused(client: shmbroker.Client) -> None:
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(BadInput, match=r"copy_in: the tensor requires grad, .* torch\.no_grad\(\)"):
        client.copy_in(weight)
    with torch.no_grad():
        assert not client.copy_in(weight).requires_grad
    assert client.arena.occupancy().blocks == 0


def test_an_arena_full_of_held_tensors_says_so(channel: Channel, client: shmbroker.Client) -> None:
    op = channel.bind("contiguous", out_spec=same)
    held = client.empty((40 << 20,), torch.uint8)
    with pytest.raises(shmbroker.ArenaFull, match="oldest: 41943040 bytes"):
        op(torch.zeros(30 << 20, dtype=torch.uint8))
    with pytest.raises(shmbroker.ArenaTooSmall, match="at least 104857600"):
        op(torch.zeros(100 << 20, dtype=torch.uint8))
    del held
    assert op(torch.zeros(30 << 20, dtype=torch.uint8)).numel() == 30 << 20


def test_calls_in_flight_that_fill_the_arena_wait_for_each_other(channel: Channel) -> None:
    op = channel.bind("total", out_spec=lambda x: TensorSpec((), torch.float64))
    futures = [op.submit(torch.ones(8 << 20, dtype=torch.uint8)) for _ in range(30)]
    assert {future.result().item() for future in futures} == {float(8 << 20)}


def test_a_tensor_that_torch_shows_with_another_sign_is_handed_over_as_shown(channel: Channel, client: shmbroker.Client) -> None:
    negated = torch.view_as_complex(client.empty((3, 2)).fill_(1.0)).conj().imag
    assert negated.is_neg()
    assert channel.bind("double")(negated).tolist() == [-2.0] * 3


class _RefusingLane:
    """A lane whose next frame cannot be written."""

    def __init__(self, lane: object) -> None:
        self._lane = lane

    def __getattr__(self, name: str) -> object:
        return getattr(self._lane, name)

    def submit(self, *_: object) -> bool:
        raise OverflowError("does not fit")


def test_a_call_whose_frame_cannot_be_written_is_not_outstanding(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    double = channel.bind("double")
    x = channel.memory.empty((4,)).fill_(1.0)
    with monkeypatch.context() as refused:
        refused.setattr(channel.pair, "lane", _RefusingLane(channel.pair.lane))
        for _ in range(3):
            with pytest.raises(OverflowError):
                double(x)
    assert channel.pair.outstanding == 0
    assert double(x).tolist() == [2.0] * 4
