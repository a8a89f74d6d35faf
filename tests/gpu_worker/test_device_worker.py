"""The CUDA device's own code between real processes, over a stand-in for the driver: pinning, staging, completions, device arenas."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import shmbroker
from shmbroker.control.status import ask
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part
from tests.gpu_worker.fake_cuda import FakeCuda
from tests.processes import PROGRAMS, START_SECONDS, ready_program, running, submissions_taken, wait_until
from tests.tee_worker.test_offload import PROMPT, generate
from tests.tiny_models import save_random, tiny_llama


@pytest.fixture(scope="module")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker() as broker:
        yield broker


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="16M") as client:
        yield client


def device_worker(folder: Path, service: str, **environment: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return ready_program("device_worker.py", str(folder), service, **environment)


def device_of(service: str) -> str:
    return next(peer.device for peer in ask(None).peers if service in peer.services)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_calls_are_staged_and_the_segment_is_pinned_while_it_is_open(client: shmbroker.Client, tmp_path: Path, lane: str) -> None:
    with device_worker(tmp_path, "fake") as process:
        assert device_of("fake") == "cpu Stand-in, pinned"
        channel = client.channel("fake", lane=lane)
        double = channel.bind("double")
        futures = [double.submit(torch.full((1000,), float(index))) for index in range(20)]
        assert [future.result()[-1].item() for future in futures] == [2.0 * index for index in range(20)]
        with pytest.raises(shmbroker.RemoteOpError, match="no such luck"):
            channel.bind("fail")(torch.ones(3))
        assert channel.bind("books")(torch.ones(1)).tolist() == [1, 0]
        kept = double.keep(torch.ones(5))
        assert double(kept).tolist() == [4.0] * 5
        with shmbroker.connect(arena="1M") as other:
            assert other.channel("fake", lane=lane).bind("books")(torch.ones(1)).tolist() == [2, 0]
        books = channel.bind("books")
        wait_until(lambda: books(torch.ones(1)).tolist() == [1, 0])
        assert process.poll() is None


def test_a_driver_that_refuses_to_pin_means_pageable_copies(client: shmbroker.Client, tmp_path: Path) -> None:
    with device_worker(tmp_path, "fake", REFUSE="cudaHostRegister"):
        assert device_of("fake") == "cpu Stand-in, pageable"
        channel = client.channel("fake")
        assert channel.bind("double")(torch.ones(3)).tolist() == [2, 2, 2]
        assert channel.bind("books")(torch.ones(1)).tolist() == [0, 0]
        assert "computed on cpu Stand-in, pageable: 2 calls" in " ".join(str(channel.report()).split())


def test_an_error_that_the_device_tells_late_is_the_answer_to_its_call(client: shmbroker.Client, tmp_path: Path) -> None:
    with device_worker(tmp_path, "fake", EVENT_FAILS="CUDA error: misaligned address") as process:
        double = client.channel("fake").bind("double")
        for _ in range(3):
            with pytest.raises(shmbroker.RemoteOpError, match="misaligned address"):
                double(torch.ones(3))
        assert process.poll() is None


def test_calls_in_flight_at_a_sigterm_are_answered(client: shmbroker.Client, tmp_path: Path) -> None:
    with device_worker(tmp_path, "fake", EVENT_SECONDS="0.3") as process:
        channel = client.channel("fake", lane="shm")
        double = channel.bind("double")
        double(torch.ones(3))
        taken = submissions_taken(channel)
        future = double.submit(torch.ones(3))
        wait_until(lambda: submissions_taken(channel) > taken)
        process.terminate()
        with contextlib.suppress(shmbroker.WorkerDraining):  # where the signal was faster than the frame
            assert future.result().tolist() == [2, 2, 2]
        assert process.wait(START_SECONDS) == 0


def test_a_worker_killed_while_copies_are_in_flight_fails_its_calls(client: shmbroker.Client, tmp_path: Path) -> None:
    with device_worker(tmp_path, "fake", EVENT_SECONDS="0.3") as process:
        double = client.channel("fake").bind("double")
        double(torch.ones(3))
        futures = [double.submit(torch.ones(3)) for _ in range(4)]
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(shmbroker.WorkerLost):
            [future.result() for future in futures]
    gc.collect()


def test_tensors_of_a_device_arena_are_handed_over_in_place(client: shmbroker.Client, tmp_path: Path) -> None:
    cuda = FakeCuda(tmp_path)
    arena = client.device_arena("1M", cuda=cuda)
    with pytest.raises(shmbroker.BadInput, match="already"):
        client.device_arena("1M", cuda=cuda)
    with device_worker(tmp_path, "fake"):
        channel = client.channel("fake")
        double = channel.bind("double")
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            x = client.empty((4, 6), dtype, device="cuda")
            x.copy_(torch.arange(24).view(4, 6))
            y = double(x)
            assert torch.equal(y, x * 2)
            assert arena.find(y) is not None, "results lie where inputs do"
            assert torch.equal(double(x[1:, 2:]), (x * 2)[1:, 2:]), "a view is handed over as it is"
            assert torch.equal(double(y), x * 4)
        step = double.capture(x)
        x.fill_(5)
        before = cuda.synchronized
        assert step.replay()[0, 0] == 10
        assert cuda.synchronized == before + 1, "what was written is waited for before each call is published"
        assert channel.report().total.copied_bytes == 0
        assert channel.bind("books")(torch.ones(1)).tolist() == [1, 1]
        kept = double.keep(x)
        assert kept.fetch()[0, 0] == 10
        del x, y, step
        gc.collect()
        assert arena.occupancy().held_bytes == 0
        channel.close()
        again = client.channel("fake")
        books = again.bind("books")
        wait_until(lambda: books(torch.ones(1)).tolist() == [1, 0])


def test_a_device_arena_is_given_back_when_its_last_tensor_has_died(broker: shmbroker.LocalBroker, tmp_path: Path) -> None:
    with shmbroker.connect(arena="1M") as client:
        client.device_arena(4096, cuda=FakeCuda(tmp_path))
        x = client.empty((3,), device="cuda")
        with pytest.raises(shmbroker.ArenaTooSmall):
            client.empty((5000,), device="cuda")
    del client
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    x.fill_(1)
    del x
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["refused", "stale", "too small", "a worker on the CPU"])
def test_a_device_arena_that_cannot_be_opened_means_a_copy_through_shared_memory(
    client: shmbroker.Client, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    arena = client.device_arena("1M", cuda=FakeCuda(tmp_path))
    if case == "stale":
        arena.handle = b"gone".ljust(64, b"\0")
    if case == "too small":
        arena.handle = b"small".ljust(64, b"\0")
        (tmp_path / "small").write_bytes(bytes(4096))
    with contextlib.ExitStack() as stack:
        if case == "a worker on the CPU":
            from tests.processes import worker_process

            stack.enter_context(worker_process("fake"))
        else:
            stack.enter_context(device_worker(tmp_path, "fake", REFUSE="cudaIpcOpenMemHandle" if case == "refused" else ""))
        channel = client.channel("fake")
        double = channel.bind("double")
        x = client.empty((1000,), device="cuda").fill_(3.0)
        for _ in range(2):
            assert double(x).unique().tolist() == [6.0]
        assert channel.report().total.copied_bytes == 8000, "it is counted"
    told = [record.getMessage() for record in caplog.records if "cannot use the device arena" in record.getMessage()]
    assert len(told) == 1
    assert {"refused": "(801)", "stale": "(400)", "too small": "its allocation has 4096"}.get(case, "computes on the CPU") in told[0]


def test_without_a_device_arena_there_is_no_tensor_in_one(client: shmbroker.Client) -> None:
    with pytest.raises(shmbroker.BadInput, match="device_arena"):
        client.empty((3,), device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(shmbroker.BadInput, match="sees no CUDA device"):
            client.device_arena("1M")


@pytest.mark.parametrize("split", [Split.LINEAR, Split.OP, Split.BLOCK, Split.LAYER])
def test_a_model_on_the_staged_device_generates_as_in_one_process(
    client: shmbroker.Client, tmp_path_factory: pytest.TempPathFactory, split: Split
) -> None:
    model = save_random(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("tiny"))
    folder = tmp_path_factory.mktemp("device")
    with running(sys.executable, str(PROGRAMS / "device_worker.py"), str(folder), "staged", str(model)) as process:

        def ready() -> bool:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            return any("staged" in peer.services for peer in ask(None).peers)

        wait_until(ready)
        parts = own_part(Checkpoint.at(model), torch.float32, split)
        offload(parts, client.channel("staged"), split)
        whole = AutoModelForCausalLM.from_pretrained(model)
        for _ in range(2):
            assert torch.equal(generate(parts, PROMPT), generate(whole, PROMPT))
