"""The benchmarks run and what they hand over is right. How long it takes is not looked at."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks import alloc, copies, cuda, replay
from benchmarks.contenders import missing, semaphore_calls, shared_memory_calls, shmbroker_calls, spin_calls, torch_queue_calls
from benchmarks.measure import Case, alternate
from shmbroker.settings.sizes import MIB


def test_the_replay_is_the_prototypes_prefill_and_every_touched_byte_arrives() -> None:
    shapes = replay.calls()
    assert len(shapes) == 98
    sent, received = (sum(replay.nbytes(getattr(shape, side)) for shape in shapes) for side in ("inputs", "outputs"))
    assert sent == 3328 * MIB + 8192 + 8192, "and 8 KiB of ids, and 8 KiB of the last hidden state"
    assert received == 3656 * MIB + 128256 * 4
    result = replay.run(0.01, 32, msgpack=False)
    assert result["calls"] == 98
    assert result["touched_equal"] == result["touched_compared"] == 98 + 16 * 9 + 2


def test_every_way_of_handing_over_completes_its_round_trips() -> None:
    with contextlib.ExitStack() as stack:
        ours, queues = stack.enter_context(shmbroker_calls(4096)), stack.enter_context(torch_queue_calls(4096))
        cases = [Case(name, call) for name, call in ours.items()]
        cases += [Case("queue", queues["reused"]), Case("views", stack.enter_context(shared_memory_calls(4096)))]
        cases += [Case("spin", stack.enter_context(spin_calls())), Case("semaphore", stack.enter_context(semaphore_calls()))]
        alternate(cases, 0.01)
        assert all(len(case.samples_ns) >= 5 for case in cases)


def test_a_contender_that_is_not_installed_is_left_out_with_the_reason() -> None:
    assert missing("json") is None
    assert "not installed" in str(missing("no_such_package"))


def test_allocation_and_copies_run() -> None:
    assert "ring, first in first out" in alloc.run(0.01)
    assert copies.run(0.01)


def test_without_a_gpu_the_cuda_benchmark_says_so_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: make test-gpu and python -m benchmarks cuda measure it")
    assert "nothing is measured" in cuda.run()["left_out"]
    assert capsys.readouterr().out.count("\n") == 1
