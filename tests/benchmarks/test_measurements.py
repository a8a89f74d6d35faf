"""What the benchmarks hand over is right."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import alloc, call_profile, copies, replay, rtt
from benchmarks.contenders import core_floor, floors, missing, ours, shared_memory, torch_queue
from benchmarks.device.copies import copies as device_copies
from benchmarks.device.model import WHOLE, model_times
from benchmarks.device.round_trips import ALONE, SHARED, round_trips
from benchmarks.driven import Driven
from benchmarks.measure import Case, alternate
from benchmarks.peer import started
from benchmarks.prefill.calls import calls, nbytes
from benchmarks.split_model.tiny import make_tiny
from benchmarks.split_model.work import Work
from shmbroker.call.compiled_op import COMPILED as CALLS_COMPILED
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


@pytest.mark.parametrize("nbytes", [64, 4096])
@pytest.mark.skipif(core_floor.no_compiler() is not None, reason="there is no gcc on this machine (Debian: apt-get install gcc)")
def test_the_core_in_c_hands_blocks_over_between_two_processes(nbytes: int) -> None:
    segments = set(Path("/dev/shm").glob("shmbroker.floor*"))
    with core_floor.calls(nbytes) as call:
        case = Case("core", call)
        alternate([case], 0.01)
    assert len(case.samples_ns) >= 5
    assert set(Path("/dev/shm").glob("shmbroker.floor*")) <= segments


def test_without_a_compiler_the_core_in_c_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_floor, "COMPILER", "no-such-compiler")
    assert "no-such-compiler" in str(core_floor.no_compiler())


def test_a_contender_whose_package_is_not_there_leaves_a_note_and_no_row() -> None:
    notes: dict[str, str] = {}
    assert rtt.module_of("another", "no_such_package", "no_such_file", notes) is None
    assert "not installed" in notes["another"]


def test_a_client_that_measures_itself_and_has_ended_is_told_of() -> None:
    with started([sys.executable, "-c", "print('ready', flush=True)"]) as process:
        process.wait()
        with pytest.raises(RuntimeError, match="has ended"):
            Driven(process)()


@pytest.mark.skipif(missing("zenoh") is not None, reason="eclipse-zenoh is not installed (make bench installs it)")
def test_zenoh_hands_buffers_over_and_leaves_no_file_behind() -> None:
    from benchmarks.contenders import zenoh_shm

    files = set(Path("/dev/shm").glob("*.zenoh"))
    with zenoh_shm.calls(4096) as ways:
        cases = [Case(name, call) for name, call in ways.items()]
        alternate(cases, 0.01)
    assert all(len(case.samples_ns) >= 5 for case in cases)
    assert set(Path("/dev/shm").glob("*.zenoh")) <= files


@pytest.mark.skipif(missing("ray") is not None, reason="Ray is not installed (make bench installs it)")
@pytest.mark.parametrize("way", ["objects", "graph"])
def test_ray_hands_tensors_over(way: str) -> None:
    from benchmarks.contenders import ray_objects

    with ray_objects.calls(4096, way) as call:
        case = Case(way, call)
        alternate([case], 0.01)
    assert len(case.samples_ns) >= 5


def test_the_stages_of_a_call_are_all_of_it() -> None:
    stages, further, compiled = call_profile.profiles(50, 4096)
    assert set(stages) == set(call_profile.WAYS)
    assert set(further) == set(call_profile.FURTHER)
    for way in stages.values():
        assert list(way) == [*call_profile.STAGES, call_profile.WHOLE]
        assert all(way[stage] < way[call_profile.WHOLE] for stage in call_profile.STAGES)
    assert bool(compiled) == CALLS_COMPILED


def test_allocation_and_copies_run() -> None:
    assert "ring, first in first out" in alloc.run(0.01)
    assert copies.run(0.01)


def test_what_is_measured_of_a_gpu_runs_on_the_cpu_too(tmp_path: Path) -> None:
    rates = device_copies("cpu", 0.0)
    assert all(rate > 0 for sides in rates.values() for ways in sides.values() for rate in ways.values())
    for rows in round_trips("cpu", 0.0).values():
        assert rows.keys() == {ALONE, SHARED}, "no device arena"
    work = Work(make_tiny(tmp_path), prefill_tokens=4, prompt_tokens=2, decode_tokens=3)
    found = model_times("cpu", work, 0.0, {"float32": torch.float32}, (Split.LAYER,))
    assert found["float32"].keys() == {WHOLE, "layer"}
