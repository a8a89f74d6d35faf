"""Calls between two real processes, on both lanes and with both doorbells."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmbroker
from shmbroker import TensorSpec
from shmbroker.arena.spec import DTYPE_NAMED
from shmbroker.client.channel import Channel
from tests.processes import wait_until


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


def test_submitted_calls_complete_as_futures_in_any_order_of_asking(channel: Channel) -> None:
    op = channel.bind("scale", factor=2.0)
    futures = [op.submit(torch.full((3,), float(number))) for number in range(20)]
    for number in reversed(range(20)):
        assert futures[number].result(timeout=10).tolist() == [2.0 * number] * 3


def test_futures_work_with_concurrent_futures_and_asyncio(channel: Channel) -> None:
    op = channel.bind("scale", factor=2.0)
    futures = [op.submit(torch.full((1,), float(number))) for number in range(8)]
    done, pending = concurrent.futures.wait(futures, timeout=20)
    assert (len(done), len(pending)) == (8, 0)
    called = threading.Event()
    op.submit(torch.ones(1)).add_done_callback(lambda future: called.set())
    assert called.wait(20)

    async def gather() -> list[torch.Tensor]:
        return await asyncio.gather(*[op.submit(torch.full((1,), float(number))) for number in range(8)])

    assert [tensor.item() for tensor in asyncio.run(gather())] == [2.0 * number for number in range(8)]


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
        thread.join(60)
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


def test_an_error_of_the_op_comes_back_with_its_type_and_text(channel: Channel) -> None:
    with pytest.raises(shmbroker.RemoteOpError, match="op 'fail' failed on worker 'test-worker': ValueError: no such luck") as caught:
        channel.bind("fail", out_spec=same)(torch.ones(1))
    assert caught.value.type_name == "ValueError"
    assert channel.bind("double")(torch.ones(1)).item() == 2.0, "the channel goes on"


def test_room_that_does_not_fit_what_the_op_writes_is_rejected_by_the_worker(channel: Channel) -> None:
    wrong = channel.bind("scale", out_spec=lambda x, factor: TensorSpec((1,), x.dtype), factor=2.0)
    with pytest.raises(shmbroker.BadFrame, match=r"writes float32\[4\], the frame has room for float32\[1\]"):
        wrong(torch.ones(4))


def test_an_unknown_op_or_argument_is_told_at_bind(channel: Channel) -> None:
    with pytest.raises(shmbroker.BadInput, match="has no op 'nope'; it has: double"):
        channel.bind("nope")
    with pytest.raises(shmbroker.BadInput, match="unexpected keyword argument 'columns'"):
        channel.bind("table", columns=3)
    with pytest.raises(shmbroker.ShmBrokerError, match="2000 rows are too many"):
        channel.bind("table", rows=2000)


def test_what_no_frame_can_carry_is_told_before_anything_is_sent(channel: Channel, client: shmbroker.Client) -> None:
    op = channel.bind("contiguous", out_spec=same)
    for bad, text in [
        (torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1), "9 dimensions"),
        (torch.zeros(2, dtype=torch.complex64), "complex64 cannot be handed over"),
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


def test_a_tensor_that_requires_grad_can_be_handed_over(channel: Channel) -> None:
    assert channel.bind("double")(torch.ones(2, requires_grad=True)).tolist() == [2.0, 2.0]


def test_a_call_past_its_deadline_raises_and_its_late_completion_is_dropped(channel: Channel, client: shmbroker.Client) -> None:
    slow = channel.bind("sleep", seconds=0.5)
    with pytest.raises(shmbroker.CallTimeout, match=r"op 'sleep', call \d+: no completion after 0\.\d+ s from worker 'test-worker'"):
        slow(torch.ones(3), timeout=0.1)
    assert channel.outstanding == 1, "its blocks stay held until the worker is done"
    assert channel.bind("double")(torch.ones(1)).item() == 2.0, "the next call waits its turn and is not mixed up"
    assert channel.outstanding == 0


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


@pytest.mark.parametrize("timeout", [0, -1.0, -1e10, float("nan")])
def test_a_timeout_that_is_none_is_refused_and_nothing_is_left_outstanding(channel: Channel, timeout: float) -> None:
    op = channel.bind("double")
    with pytest.raises(shmbroker.BadInput, match="must be a positive number of seconds"):
        op(torch.ones(1), timeout=timeout)
    assert op(torch.ones(1), timeout=1e30).item() == 2.0
    assert channel.outstanding == 0


def test_an_op_that_changes_its_input_is_given_the_true_one_each_time(channel: Channel, client: shmbroker.Client) -> None:
    """A worker recognises a frame that it has checked before, and keeps its tensors: not those that an op has turned round."""
    turned = channel.bind("turn_in_place", out_spec=lambda x: TensorSpec((2,), torch.int64))
    x = client.empty((3, 4)).fill_(1.0)
    for _ in range(3):
        assert turned(x).tolist() == [4, 3]


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
    assert called.wait(20)
    assert isinstance(told[0], shmbroker.CallTimeout)
    assert channel.outstanding == 2
    channel.close()
    report = channel.report().total
    assert (report.errors, report.calls) == (2, 0), "each call that timed out is counted once"


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


def test_a_tensor_that_torch_shows_with_another_sign_is_handed_over_as_shown(channel: Channel, client: shmbroker.Client) -> None:
    negated = torch.view_as_complex(client.empty((3, 2)).fill_(1.0)).conj().imag
    assert negated.is_neg()
    assert channel.bind("double")(negated).tolist() == [-2.0] * 3


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


def test_arguments_that_cannot_travel_are_told_by_name_of_the_op(channel: Channel) -> None:
    with pytest.raises(shmbroker.BadInput, match="op 'scale': static arguments are numbers"):
        channel.bind("scale", factor=torch.ones(1))
    with pytest.raises(shmbroker.BadInput, match="op 'add': a call's own arguments are numbers"):
        channel.bind("add", out_spec=same)(torch.ones(1), term=torch.ones(1))
    with pytest.raises(shmbroker.BadInput, match="named by a string"):
        channel.bind(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2.5,), (-1,), (1 << 62, 4), ("3",)])
def test_shapes_that_are_none_are_refused(client: shmbroker.Client, shape: tuple[int, ...]) -> None:
    with pytest.raises(shmbroker.BadInput, match="shape"):
        client.empty(shape)
    assert client.empty(5).shape == (5,)


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
        wait_until(lambda: channel.memory.arena.occupancy().blocks == before, 10.0)  # the background thread has to see it too
    finally:
        gc.enable()


def test_a_callback_may_make_calls_and_wait_for_them(channel: Channel) -> None:
    """C5: whoever takes completions is not held up by what is done with them."""
    double = channel.bind("double")
    outcomes: list[float] = []
    done = threading.Event()

    def call_again(future: concurrent.futures.Future[torch.Tensor]) -> None:
        outcomes.append(double(future.result()).sum().item())
        outcomes.append(double.submit(future.result()).result(10).sum().item())
        done.set()

    for ask in (lambda future: done.wait(10), lambda future: future.result(10)):
        done.clear()
        future = double.submit(torch.ones(4))
        future.add_done_callback(call_again)
        ask(future)
        assert done.wait(10)
    assert outcomes == [16.0] * 4
