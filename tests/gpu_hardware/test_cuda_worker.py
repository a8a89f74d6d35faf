"""Real copies: end to end on ``cuda:0``, pinned and pageable, CUDA IPC between processes, and processes killed in the midst of copies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.control.status import ask
from tests.processes import ready_program, wait_until

LARGE = 8 << 20
"""float32: 32 MiB, a copy of milliseconds."""

KILLED_CLIENT = """
import sys, torch, shmbroker
client = shmbroker.connect(arena="256M")
if sys.argv[1] == "device":
    client.device_arena("256M")
x = client.empty((1 << 23,), device="cuda" if sys.argv[1] == "device" else "cpu")
double = client.channel("cuda").bind("double")
double(x)
print("ready", flush=True)
while True:
    [future.result() for future in [double.submit(x), double.submit(x)]]
"""


def cuda_worker(**environment: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return ready_program("cuda_worker.py", "cuda", **environment)


@pytest.mark.parametrize("pageable", ["", "1"], ids=["pinned", "pageable"])
def test_results_come_back_right(client: shmbroker.Client, pageable: str) -> None:
    with cuda_worker(PAGEABLE=pageable):
        told = next(peer.device for peer in ask(None).peers if "cuda" in peer.services)
        assert told.startswith("cuda:0 ")
        if pageable:
            assert told.endswith(", pageable")
        double = client.channel("cuda").bind("double")
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            tensors = [torch.arange(10_000).to(dtype) + index for index in range(8)]
            futures = [double.submit(tensor) for tensor in tensors]
            for tensor, future in zip(tensors, futures, strict=True):
                assert torch.equal(future.result(), tensor * 2)


def test_a_device_arena_is_shared_between_two_processes_to_the_byte(client: shmbroker.Client) -> None:
    client.device_arena("256M")
    with cuda_worker():
        channel = client.channel("cuda")
        double = channel.bind("double")
        for seed in range(5):
            torch.manual_seed(seed)
            x = client.empty((LARGE // 8,), torch.int64, device="cuda")
            x.random_(0, 1 << 40)
            y = double(x)
            assert y.is_cuda
            assert torch.equal(y, x * 2)
            assert int(y.sum()) == 2 * int(x.sum())
        assert channel.report().total.copied_bytes == 0
        kept = double.keep(x)
        assert torch.equal(kept.fetch(), x.cpu() * 2)


def test_a_worker_killed_amid_copies_fails_its_calls_and_the_next_one_serves(client: shmbroker.Client) -> None:
    x = torch.ones(LARGE // 4)
    for _ in range(2):
        with cuda_worker() as process:
            double = client.channel("cuda").bind("double")
            assert double(x)[0] == 2
            futures = [double.submit(x) for _ in range(3)]
            os.kill(process.pid, signal.SIGKILL)
            outcomes = [future.exception() for future in futures]
            assert all(outcome is None or isinstance(outcome, shmbroker.WorkerLost) for outcome in outcomes)
            process.wait()
        wait_until(lambda: not any("cuda" in peer.services for peer in ask(None).peers))


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_client_killed_amid_copies_leaves_the_worker_serving(client: shmbroker.Client, tmp_path: Path, where: str) -> None:
    program = tmp_path / "client.py"
    program.write_text(KILLED_CLIENT)
    with cuda_worker() as worker:
        free = torch.cuda.mem_get_info()[0]
        for _ in range(3):
            with subprocess.Popen([sys.executable, str(program), where], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                try:
                    assert process.stdout.readline() == b"ready\n"
                finally:
                    process.kill()
        double = client.channel("cuda").bind("double")
        assert double(torch.ones(5)).tolist() == [2] * 5
        assert worker.poll() is None
        # The driver frees what the dead left once the worker has closed it: within the size of one arena of what was free.
        wait_until(lambda: torch.cuda.mem_get_info()[0] > free - (256 << 20))
