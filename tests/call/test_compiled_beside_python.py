"""Calls that are made without Python, beside the same calls in Python: whatever is done, the same comes of it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmbroker
from shmbroker import TensorSpec
from shmbroker.call import compiled_op
from shmbroker.client.channel import Channel
from tests.processes import worker_process

pytestmark = pytest.mark.skipif(
    not compiled_op.COMPILED, reason="no compiled calls here: not built, or a torch without the exchange of tensors"
)

Bind = Callable[..., Any]


def same(x: TensorSpec) -> TensorSpec:
    return x


SHAPES = [(), (0, 3), (1,), (7,), (3, 5), (5, 3), (2, 3, 4), (70, 300)]
FORMS = ["in the arena", "elsewhere", "a view inside", "transposed", "strided elsewhere"]
DTYPES = [torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn]
STEPS = st.one_of(
    st.tuples(
        st.just("call"),
        st.sampled_from(SHAPES),
        st.sampled_from(FORMS),
        st.sampled_from(DTYPES),
        st.sampled_from(["contiguous", "fail", "twins"]),
    ),
    st.tuples(st.just("call"), st.sampled_from(SHAPES[3:5]), st.just("in the arena"), st.just(torch.float32), st.just("contiguous")),
    st.tuples(st.just("capture"), st.sampled_from(SHAPES), st.sampled_from(DTYPES)),
    st.tuples(st.just("replay"), st.integers(0, 3)),
    st.tuples(st.just("free"), st.integers(0, 5)),
    st.tuples(st.just("free all")),
)


class Side:
    """One of two clients that do the same: what it holds, and what came of each step."""

    def __init__(self, channel: Channel, bind: Bind) -> None:
        self.memory, self.close = channel.memory, channel.close
        self.ops = {name: bind(name, out_spec=same) for name in ("contiguous", "fail")}
        self.ops["twins"] = bind("twins")
        self.held: list[Any] = []
        self.captured: list[Any] = []

    def tensor(self, shape: tuple[int, ...], form: str, dtype: torch.dtype) -> torch.Tensor:
        values = (torch.arange(max(1, torch.Size(shape).numel())) % 7)[: torch.Size(shape).numel()].reshape(shape)
        outside = values.to(torch.float32).to(dtype)
        if form == "elsewhere":
            return outside
        if form == "strided elsewhere":
            return outside.t().clone().t() if outside.ndim == 2 else outside
        if form == "a view inside":
            room = self.memory.empty((outside.numel() + 3,), dtype)
            return room[3:].copy_(outside.flatten()).reshape(shape)
        room = self.memory.empty(shape, dtype)
        room.copy_(outside)
        return room.t() if form == "transposed" and room.ndim == 2 else room

    def do(self, step: tuple[Any, ...]) -> object:
        """What came of it, as plain values."""
        try:
            return self._do(step)
        except shmbroker.ShmBrokerError as error:
            return type(error).__name__

    def _do(self, step: tuple[Any, ...]) -> object:
        if step[0] == "call":
            _, shape, form, dtype, name = step
            x = self.tensor(shape, form, dtype)
            result = self.ops[name](x)
            self.held.append(result)
            return plain(result)
        if step[0] == "capture":
            self.captured.append(self.ops["contiguous"].capture(self.tensor(step[1], "in the arena", step[2])))
        elif step[0] == "replay" and self.captured:
            return plain(self.captured[step[1] % len(self.captured)].replay())
        elif step[0] == "free" and self.held:
            del self.held[step[1] % len(self.held)]
        elif step[0] == "free all":
            self.held.clear()
            self.captured.clear()
        return None

    def blocks(self) -> int:
        """How many are held, but for what waits to be collected."""
        blocks: int = self.memory.arena.occupancy().blocks
        return blocks


def plain(result: Any) -> object:
    tensors = result if isinstance(result, tuple) else (result,)
    return [(tuple(one.shape), one.dtype, one.stride(), one.contiguous().flatten().view(torch.uint8).tolist()) for one in tensors]


@pytest.fixture
def sides(broker: shmbroker.LocalBroker, worker: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Side]]]:
    """Makes two sides with nothing held yet: the first makes ordinary calls without Python."""
    with contextlib.ExitStack() as undo:

        def bound(client: shmbroker.Client, service: str, wanted: bool) -> Side:
            channel = client.channel(service, lane="shm", doorbell="sem")
            with monkeypatch.context() as patch:
                patch.setattr(compiled_op, "COMPILED", wanted)
                return Side(channel, channel.bind)

        clients = [undo.enter_context(shmbroker.connect(arena="16M", place_timeout=1.0)) for _ in range(2)]
        yield lambda service="test": [bound(client, service, wanted) for client, wanted in zip(clients, (True, False), strict=True)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(STEPS, min_size=1, max_size=40))
def test_whatever_is_done_comes_out_as_in_python(sides: Callable[..., list[Side]], steps: list[tuple[Any, ...]]) -> None:
    """O3."""
    compiled, reference = sides()
    for step in steps:
        assert compiled.do(step) == reference.do(step), step
    for name, op in compiled.ops.items():
        assert repr(op).split(":")[-1] == repr(reference.ops[name]).split(":")[-1], "counted alike"
    assert compiled.blocks() == reference.blocks()
    for side in (compiled, reference):
        side.close()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(STEPS, min_size=5, max_size=20), after=st.integers(0, 10))
def test_a_death_comes_out_as_in_python(
    sides: Callable[..., list[Side]], broker: shmbroker.LocalBroker, steps: list[tuple[Any, ...]], after: int
) -> None:
    with worker_process("twice-mortal") as process:
        both = sides("twice-mortal")
        for number, step in enumerate(steps):
            if number == after:
                process.kill()
                process.wait()
            compiled, reference = [side.do(step) for side in both]
            assert compiled == reference, step
        for side in both:
            side.held.clear()
            side.captured.clear()
        gc.collect()
        assert [side.blocks() for side in both] == [0, 0]
        for side in both:
            side.close()
