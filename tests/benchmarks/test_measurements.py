"""What the benchmarks hand over is right."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from benchmarks import alloc, copies, replay
from benchmarks.contenders import floors, missing, ours, shared_memory, torch_queue
from benchmarks.device.copies import copies as device_copies
from benchmarks.device.prefill import WHOLE, prefills
from benchmarks.device.round_trips import round_trips
from benchmarks.measure import Case, alternate
from benchmarks.prefill.calls import calls, nbytes
from benchmarks.split_model.tiny import make_tiny
from shmbroker.settings.sizes import MIB
from tee_worker import Split


def test_the_replay_is_the_prototypes_prefill_and_every_touched_byte_arrives() -> None:
    shapes = calls()
    assert len(shapes) == 98
    sent, received = (sum(nbytes(getattr(shape, side)) for shape in shapes) for side in ("inputs", "outputs"))
    assert sent == 3328 * MIB + 8192 + 8192, "and 8 KiB of ids, and 8 KiB of the last hidden state"
    assert received == 3656 * MIB + 128256 * 4
    result = replay.run(0.01, 32, msgpack=False)
    assert result["calls"] == 98
    assert result["touched_equal"] == result["touched_compared"] == 98 + 16 * 9 + 2


def test_every_way_of_handing_over_completes_its_round_trips() -> None:
    with contextlib.ExitStack() as stack:
        own, queues = stack.enter_context(ours.calls(4096)), stack.enter_context(torch_queue.calls(4096))
        cases = [Case(name, call) for name, call in own.items()]
        cases += [Case("queue", queues["reused"]), Case("views", stack.enter_context(shared_memory.calls(4096)))]
        cases += [Case("spin", stack.enter_context(floors.spin())), Case("semaphore", stack.enter_context(floors.semaphore()))]
        alternate(cases, 0.01)
        assert all(len(case.samples_ns) >= 5 for case in cases)


def test_a_contender_that_is_not_installed_is_left_out_with_the_reason() -> None:
    assert missing("json") is None
    assert "not installed" in str(missing("no_such_package"))


def test_allocation_and_copies_run() -> None:
    assert "ring, first in first out" in alloc.run(0.01)
    assert copies.run(0.01)


def test_what_is_measured_of_a_gpu_runs_on_the_cpu_too(tmp_path: Path) -> None:
    rates = device_copies("cpu", 0.0)
    assert all(rate > 0 for sides in rates.values() for ways in sides.values() for rate in ways.values())
    assert set(round_trips("cpu", 0.0)) == {"shared memory"}, "no device arena"
    found = prefills("cpu", make_tiny(tmp_path), 4, 0.0, {"float32": torch.float32}, (Split.LAYER,))
    assert found["float32"].keys() == {WHOLE, "layer"}
