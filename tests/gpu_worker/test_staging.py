"""Staging: what goes up, what comes down, and what waits for what. Its numbered rules by number."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.cuda.staging import SLOTS, Staging
from tests.gpu_worker.fake_cuda import FakeStreams


def staging(streams: FakeStreams, *resident: torch.Tensor) -> Staging:
    there = {tensor.data_ptr() for tensor in resident}
    return Staging(streams, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8), lambda tensor: tensor.data_ptr() in there)


def double(x: torch.Tensor, *, out: torch.Tensor, by: float = 2.0) -> None:
    torch.mul(x, by, out=out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_values_go_up_are_computed_and_come_down(dtype: torch.dtype) -> None:
    run = staging(FakeStreams()).staged(double)
    for size in (1, 7, 300, 0):
        x, out = torch.arange(size).to(dtype), torch.zeros(size, dtype=dtype)
        run(x, out=out, by=3).wait()
        assert torch.equal(out, x * 3)


def test_strided_inputs_and_several_outputs() -> None:
    def both(a: torch.Tensor, b: torch.Tensor, *, out: tuple[torch.Tensor, ...]) -> None:
        torch.mm(a, b, out=out[0])
        out[1].copy_(a.sum(1))

    a, b = torch.randn(5, 3).t(), torch.randn(20, 8)[::4, 1::2]
    outs = torch.empty(3, 4), torch.empty(4, 3).t()[:, 0]
    staging(FakeStreams()).staged(both)(a, b, out=outs).wait()
    assert torch.allclose(outs[0], a @ b)
    assert torch.allclose(outs[1], a.sum(1))


def test_s2_the_op_waits_for_the_inputs_and_the_copies_down_for_the_op() -> None:
    streams = FakeStreams()
    staging(streams).staged(double)(torch.ones(4), out=torch.empty(4))
    at = streams.log.index
    up = next(entry for entry in streams.log if entry.startswith("compute after up"))
    down = next(entry for entry in streams.log if entry.startswith("down after compute"))
    assert at("on up") < at(up) < at(down) < at("on down")
    assert streams.log[-1].startswith("mark down"), "nothing was waited for"


def test_s1_memory_of_a_call_in_flight_is_not_used_again() -> None:
    streams = FakeStreams()
    run = staging(streams).staged(double)
    for _ in range(SLOTS):
        run(torch.ones(4), out=torch.empty(4))
    assert not [entry for entry in streams.log if entry.startswith("wait")]
    first = next(entry for entry in streams.log if entry.startswith("mark down")).removeprefix("mark ")
    run(torch.ones(4), out=torch.empty(4))
    assert [entry for entry in streams.log if entry.startswith("wait")] == [f"wait {first}"]


def test_s3_a_call_that_fails_is_answered_when_nothing_moves_any_more() -> None:
    streams = FakeStreams()

    def fail(x: torch.Tensor, *, out: torch.Tensor) -> None:
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        staging(streams).staged(fail)(torch.ones(4), out=torch.empty(4))
    assert {entry.split()[1] for entry in streams.log if entry.startswith("wait")} == {"up", "compute", "down"}


def test_what_is_there_already_is_not_moved_nor_what_is_read_on_the_host() -> None:
    seen = []

    def look(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, out: torch.Tensor) -> None:
        seen.extend([a.data_ptr(), b.data_ptr(), c.data_ptr(), out.data_ptr()])
        out.fill_(1.0)

    a, b, c, out = (torch.ones(4) for _ in range(4))
    streams = FakeStreams()
    staging(streams, a, out).staged(look, on_host=(2,))(a, b, c, out=out)
    assert [seen[0], seen[2], seen[3]] == [a.data_ptr(), c.data_ptr(), out.data_ptr()]
    assert seen[1] != b.data_ptr()
    assert "on down" not in streams.log
    assert streams.log[-1].startswith("mark compute")


def test_an_error_on_the_device_is_told_to_whoever_waits_and_the_next_calls_run() -> None:
    streams = FakeStreams(fail="CUDA error: unspecified launch failure")
    run = staging(streams).staged(double)
    flights = [run(torch.ones(4), out=torch.empty(4)) for _ in range(SLOTS + 1)]
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        flights[0].wait()
    streams.fail = ""
    out = torch.empty(4)
    run(torch.ones(4), out=out).wait()
    assert out.tolist() == [2, 2, 2, 2]


def test_memory_that_grew_is_not_written_while_the_device_computes_with_what_it_was() -> None:
    streams = FakeStreams()
    run = staging(streams).staged(double)
    run(torch.ones(4), out=torch.empty(4))
    assert any(entry.startswith("up after compute") for entry in streams.log)
