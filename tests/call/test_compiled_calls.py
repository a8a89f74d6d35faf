"""Calls that are made without Python: which are, and that nothing is otherwise for whoever makes them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import shmbroker
from shmbroker import BadInput, CallTimeout, RemoteOpError, TensorSpec, WorkerLost
from shmbroker.call import compiled_op
from shmbroker.client.channel import Channel
from shmbroker.errors import ArenaBusy
from tests.processes import wait_until, worker_process

pytestmark = pytest.mark.skipif(
    not compiled_op.COMPILED, reason="no compiled calls here: not built, or a torch without the exchange of tensors"
)

Bind = Callable[..., Any]


def same(x: TensorSpec) -> TensorSpec:
    return x


@pytest.fixture
def compiled(client: shmbroker.Client, worker: int) -> Channel:
    return client.channel("test", lane="shm", doorbell="sem")


@pytest.fixture
def in_python(client: shmbroker.Client, worker: int, monkeypatch: pytest.MonkeyPatch) -> Bind:
    """Binds on another channel to the same worker, ops that Python calls."""
    channel = client.channel("test", lane="shm", doorbell="sem")

    def bind(op: str, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(compiled_op, "COMPILED", False)
            bound = channel.bind(op, **options)
        assert bound.fast is None
        return bound

    return bind


def inside(channel: Channel, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers in the arena, small and whole, so that every way of adding them is exact."""
    tensor = channel.memory.empty(shape, dtype)
    return tensor.copy_(torch.arange(tensor.numel()).reshape(shape) % 100)


def test_once_a_kind_is_known_its_calls_are_made_without_python(compiled: Channel) -> None:
    op, x = compiled.bind("scale", factor=2.0), inside(compiled, 4, 6)
    expected = x * 2
    for _ in range(20):
        assert torch.equal(op(x), expected)
    assert op.fast.made >= 17, "but for the first ones, whose outputs found no dead block"
    assert op(x).is_contiguous()


def test_arguments_that_are_none_at_all_make_no_difference(compiled: Channel) -> None:
    op, x, none = compiled.bind("scale", factor=2.0), inside(compiled, 4, 6), dict[str, Any]()
    for _ in range(10):
        op(x, **none)
    assert op.fast.made >= 7


def test_a_replay_is_made_without_python(compiled: Channel) -> None:
    captured = compiled.bind("scale", factor=2.0).capture(inside(compiled, 4, 6))
    for step in range(20):
        captured.inputs[0].fill_(step)
        assert captured.replay().flatten().tolist() == [2.0 * step] * 24


def test_a_small_contiguous_input_from_elsewhere_is_copied_without_python(compiled: Channel) -> None:
    op, x = compiled.bind("scale", factor=2.0), inside(compiled, 4, 6)
    for _ in range(3):
        op(x)
    made = op.fast.made
    for number in range(20):
        outside = torch.full((4, 6), float(number))
        assert torch.equal(op(outside), outside * 2)
    assert op.fast.made >= made + 17
    report = compiled.report()
    assert "scale" in str(report)


def test_what_was_copied_is_free_when_the_call_is_over(compiled: Channel) -> None:
    op = compiled.bind("scale", factor=2.0)
    for _ in range(5):
        op(torch.ones(1000))
    gc.collect()
    assert compiled.memory.arena.occupancy().blocks == 0


class Odd:
    """Inputs that are more than the block they begin, or less: made of a tensor in the arena."""

    @staticmethod
    def view_inside(x: torch.Tensor) -> torch.Tensor:
        return x[1:]

    @staticmethod
    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.t()

    @staticmethod
    def parameter(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.Parameter(x, requires_grad=False)

    @staticmethod
    def empty(x: torch.Tensor) -> torch.Tensor:
        return x[:0]

    @staticmethod
    def strided_from_elsewhere(x: torch.Tensor) -> torch.Tensor:
        return x.clone().t()

    @staticmethod
    def large_from_elsewhere(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(100_000)

    @staticmethod
    def negated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.view(-1, 2)).conj().imag

    @staticmethod
    def negated_at_the_block_begin(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.view(-1, 2)).conj().imag.as_strided((3,), (1,), 0)

    @staticmethod
    def complex(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.view(-1, 2))

    @staticmethod
    def conjugate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.view(-1, 2)).conj()


ODD = [name for name in vars(Odd) if not name.startswith("_")]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_input_gives_what_it_gives_in_python(compiled: Channel, in_python: Bind, name: str) -> None:
    """O1."""
    x = inside(compiled, 4, 6)
    op, reference = compiled.bind("contiguous", out_spec=same), in_python("contiguous", out_spec=same)
    for _ in range(4):
        odd = getattr(Odd, name)(x)
        result, expected = op(odd), reference(odd)
        assert torch.equal(result, expected)
        assert torch.equal(result, odd.resolve_neg().resolve_conj())
        assert torch.equal(op(x), x), "what comes after is as before"


def gradient(x: torch.Tensor, call: Callable[[torch.Tensor], object]) -> None:
    call(x.requires_grad_())


def tangent(x: torch.Tensor, call: Callable[[torch.Tensor], object]) -> None:
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)))


def mapped(x: torch.Tensor, call: Callable[[torch.Tensor], object]) -> None:
    torch.func.vmap(lambda row: (call(row), row)[1])(x)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("attempt", [gradient, tangent, mapped])
def test_what_python_refuses_is_refused(compiled: Channel, attempt: Callable[..., None], elsewhere: bool) -> None:
    op, x = compiled.bind("contiguous", out_spec=same), inside(compiled, 4, 6)
    for _ in range(3):
        op(x)
        op(x[0].clone())
    with pytest.raises(BadInput):
        attempt(x.clone() if elsewhere else x, op)


def test_no_gradient_is_wanted_where_none_is_recorded(compiled: Channel) -> None:
    op, x = compiled.bind("contiguous", out_spec=same), inside(compiled, 4)
    for _ in range(3):
        op(x)
    with torch.no_grad():
        assert torch.equal(op(x.requires_grad_()), x.detach())


def test_an_error_of_the_op_is_raised_and_the_next_call_is_ordinary(compiled: Channel) -> None:
    op, x = compiled.bind("scale", factor=1.0), inside(compiled, 4)
    failing = compiled.bind("fail", out_spec=same)
    for _ in range(3):
        op(x)
        with pytest.raises(RemoteOpError, match="ValueError"):
            failing(x)
    assert torch.equal(op(x), x)


def test_calls_are_counted_as_in_python(compiled: Channel, in_python: Bind) -> None:
    op, reference = compiled.bind("scale", factor=2.0), in_python("scale", factor=2.0)
    x, outside = inside(compiled, 4, 6), torch.ones(4, 6)
    for one in (op, reference):
        for tensor in (x, x, x, outside, outside, outside):
            one(tensor)
    assert op.fast.made > 0
    counted, expected = repr(op), repr(reference)
    assert counted.split(":")[-1] == expected.split(":")[-1] == " 6 calls, 0 failed>"


def test_threads_that_call_at_once_each_have_their_own_result(compiled: Channel) -> None:
    op = compiled.bind("scale", factor=2.0)
    wrong: list[float] = []

    def call(number: int) -> None:
        x = compiled.memory.empty((64,), torch.float32)
        for step in range(300):
            x.fill_(1000 * number + step)
            if not torch.equal(op(x), x * 2):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class CallsWhenItDies:
    """A finaliser that calls: whatever it does in the midst of another call must not harm that one."""

    def __init__(self, op: Any, results: list[bool]) -> None:
        self.op, self.results, self.itself = op, results, self

    def __del__(self) -> None:
        with contextlib.suppress(ArenaBusy):
            x = torch.full((8,), 3.0)
            self.results.append(torch.equal(self.op(x), x * 2))


def test_a_finaliser_may_call_in_the_midst_of_a_call(compiled: Channel) -> None:
    op, x = compiled.bind("scale", factor=2.0), inside(compiled, 4, 6)
    results: list[bool] = []
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(200):
            CallsWhenItDies(op, results)
            assert torch.equal(op(x), x * 2)
    finally:
        gc.set_threshold(*thresholds)
    assert results, "some ran"
    assert all(results)


class Amid(TorchFunctionMode):
    """Does something once when torch is asked for anything while a call is outstanding: in the midst of it."""

    def __init__(self, channel: Channel, action: Callable[[], object]) -> None:
        super().__init__()
        self.channel, self.action = channel, action

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.channel.pair.outstanding and self.action is not None:
            action, self.action = self.action, None  # type: ignore[assignment]
            action()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["another reads the answer", "the channel is closed"])
def test_a_call_that_fails_in_the_hands_of_another_is_not_taken_for_done(compiled: Channel, what: str) -> None:
    """O2."""
    op = compiled.bind("fail_for_negative")
    captured = op.capture(inside(compiled, 4))
    for _ in range(3):
        captured.replay()

    def look() -> None:
        while compiled.pair.outstanding:
            compiled.pair.completions.look()

    captured.inputs[0].fill_(-1)
    made = op.fast.made
    if what == "the channel is closed":
        with Amid(compiled, compiled.close), pytest.raises((WorkerLost, RemoteOpError)):
            captured.replay()
    else:
        with Amid(compiled, look), pytest.raises(RemoteOpError, match="negative"):
            captured.replay()
    assert op.fast.made == made + 1


def test_closing_over_an_ordinary_call_without_tensors_ends_it(client: shmbroker.Client, worker: int, tmp_path: Path) -> None:
    """O2."""
    channel, file = client.channel("test", lane="shm"), tmp_path / "wait"
    op = channel.bind("wait_while_there_is", file=str(file))
    for _ in range(4):
        assert op() == ()
    made = op.fast.made
    file.touch()
    outcome: list[BaseException] = []

    def call() -> None:
        try:
            op()
        except shmbroker.ShmBrokerError as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: channel.pair.outstanding == 1)
    try:
        channel.close()
        thread.join()
    finally:
        file.unlink()
    assert op.fast.made == made + 1
    assert [type(error) for error in outcome] == [WorkerLost]


def test_ordinary_calls_on_one_channel_do_not_keep_another_kind_on_another_waiting(client: shmbroker.Client, worker: int) -> None:
    busy, other = (client.channel("test", lane="shm") for _ in range(2))
    compute, double = busy.bind("compute", seconds=0.0005), other.bind("double", out_spec=same)
    captured = [compute.capture(inside(busy, 4)) for _ in range(12)]
    for one in captured:
        one.replay()
    count, over = itertools.count(), threading.Event()

    def flood() -> None:
        futures = deque(one.submit() for one in captured)
        while not over.is_set():
            futures.popleft().result()
            futures.append(captured[next(count) % 12].submit())
        for future in futures:
            future.result()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        wait_until(lambda: next(count) > 100)
        before = next(count)
        for rows in range(1, 6):
            double(inside(other, rows, 3))  # each of a kind that is new
        assert next(count) - before < 2000, "calls of the busy channel, where one after the other they would be some fifty"
    finally:
        over.set()
        thread.join()


def test_an_input_that_reaches_beyond_its_storage_is_refused(compiled: Channel, in_python: Bind) -> None:
    for op in (compiled.bind("contiguous", out_spec=same), in_python("contiguous", out_spec=same)):
        for _ in range(3):
            op(torch.ones(64))
        for left in (0, 4):
            resized = torch.ones(64)
            resized.untyped_storage().resize_(left)
            with pytest.raises(BadInput, match=f"beyond its storage of {left} bytes"):
                op(resized)


class ClosesWhenItDies:
    """A finaliser that closes the channel of the call in whose midst it runs."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.itself = channel, self

    def __del__(self) -> None:
        self.channel.close()


def test_a_finaliser_may_close_the_channel_in_the_midst_of_a_call(client: shmbroker.Client, worker: int) -> None:
    """O2."""
    lost = 0
    thresholds = gc.get_threshold()
    for _ in range(20):
        channel = client.channel("test", lane="shm")
        op, x = channel.bind("scale", factor=2.0), inside(channel, 4, 6)
        for _ in range(4):
            op(x)
        gc.collect()
        ClosesWhenItDies(channel)
        gc.set_threshold(1, 1, 1)
        try:
            result = op(x)
        except shmbroker.ShmBrokerError:
            lost += 1
        else:
            assert torch.equal(result, x * 2), "never an output that nobody has written"
        finally:
            gc.set_threshold(*thresholds)
        channel.close()
    assert lost, "some were closed in the midst"


def test_a_channel_that_is_closed_refuses_and_lets_go_of_its_memory(client: shmbroker.Client, worker: int) -> None:
    channel = client.channel("test", lane="shm")
    op, x = channel.bind("scale", factor=2.0), client.empty((8,), torch.float32)
    captured = op.capture(x)
    for _ in range(3):
        op(x)
        captured.replay()
    channel.close()
    for call in (lambda: op(x), captured.replay):
        with pytest.raises(shmbroker.ChannelError):
            call()


@pytest.fixture
def mortal(broker: shmbroker.LocalBroker) -> Iterator[Callable[[], tuple[Any, shmbroker.Client]]]:
    """Starts workers that may be killed, each with a client."""
    with contextlib.ExitStack() as undo:

        def start() -> tuple[Any, shmbroker.Client]:
            process = undo.enter_context(worker_process("mortal"))
            return process, undo.enter_context(shmbroker.connect(arena="16M", place_timeout=1.0))

        yield start


def kill(process: Any) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_worker_that_dies_amid_an_ordinary_call_is_lost_and_its_blocks_are_free(
    mortal: Callable[[], tuple[Any, shmbroker.Client]],
) -> None:
    """O2."""
    process, client = mortal()
    channel = client.channel("mortal", lane="shm")
    op, x = channel.bind("sleep_for_the_first"), inside(channel, 8)
    for _ in range(3):
        op(x)
    made = op.fast.made
    x[0] = 600.0
    killer = threading.Timer(0.3, kill, [process])
    killer.start()
    with pytest.raises(WorkerLost):
        op(x)
    assert op.fast.made == made + 1
    killer.join()
    with pytest.raises(WorkerLost):
        op(x)
    assert op.fast.made == made + 1
    del x
    gc.collect()
    assert channel.memory.arena.occupancy().blocks == 0


def test_a_deadline_that_passes_amid_an_ordinary_call_is_told_and_the_blocks_stay_the_workers(
    mortal: Callable[[], tuple[Any, shmbroker.Client]],
) -> None:
    """O2."""
    process, _ = mortal()
    with shmbroker.connect(arena="16M", timeout=0.5) as hasty:
        channel = hasty.channel("mortal", lane="shm")
        op, x = channel.bind("sleep_for_the_first"), inside(channel, 8)
        for _ in range(3):
            op(x)
        made = op.fast.made
        x[0] = 600.0
        with pytest.raises(CallTimeout, match="no completion after"):
            op(x)
        assert op.fast.made == made + 1
        del x
        gc.collect()
        assert channel.memory.arena.occupancy().blocks == 2, "input and output are still the worker's"
        kill(process)


def test_a_call_whose_worker_has_died_before_it_is_lost(mortal: Callable[[], tuple[Any, shmbroker.Client]]) -> None:
    process, client = mortal()
    channel = client.channel("mortal", lane="shm")
    op, x = channel.bind("scale", factor=2.0), inside(channel, 8)
    captured = op.capture(x)
    for _ in range(3):
        op(x)
        captured.replay()
    kill(process)
    for call in (captured.replay, lambda: op(x), captured.replay):
        with pytest.raises(WorkerLost):
            call()
