"""``cuda``: copies between the arena and a GPU, round trips with CUDA IPC, and the prefill at each split and dtype. Says so where there is none."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch

import shmbroker
from benchmarks.measure import size_text
from benchmarks.table import Table
from shmbroker.client.local_broker import stop_process
from shmbroker.errors import ShmBrokerError
from shmbroker.models import embedded
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

COPY_SIZES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)
ROUND_TRIP_BYTES = 8 << 20
PREFILL_TOKENS = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(seconds: float = 2.0) -> dict[str, Any]:
    """Measure, about ``seconds`` a case; microseconds and milliseconds, medians. Without a GPU: the reason, and nothing else."""
    if not torch.cuda.is_available():
        reason = f"no CUDA device (torch {torch.__version__}): nothing is measured"
        click.echo(reason)
        return {"left_out": reason}
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(0)}
    with shmbroker.local_broker():
        figures["copies"] = _copies(seconds)
        figures["round_trips"] = _round_trips(seconds)
        figures["prefill"] = _prefills()
    return figures


def _median(call: Callable[[], object], seconds: float) -> float:
    """Seconds."""
    for _ in range(3):
        call()
    samples = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(samples) < 5:
        begun = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)


def _copies(seconds: float) -> dict[str, Any]:
    """From the arena, registered as a worker registers it, against torch's own pinned memory and pageable memory."""
    from gpu_worker.cuda.device import open_cuda

    device = open_cuda("cuda:0")
    assert device.memory is not None
    table = Table("copies, GiB/s", ["size", "arena up", "pinned up", "pageable up", "arena down", "pinned down", "pageable down"])
    result: dict[str, Any] = {}
    with shmbroker.connect(arena=256 << 20) as client:
        segment = client.segment
        unpin = device.memory.map(client.arena.address, segment.geometry.total_bytes)
        for nbytes in COPY_SIZES:
            there = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
            sides = {
                "arena": client.empty((nbytes,), torch.uint8).fill_(1),
                "pinned": torch.ones(nbytes, dtype=torch.uint8, pin_memory=True),
                "pageable": torch.ones(nbytes, dtype=torch.uint8),
            }
            rates: dict[str, float] = {}
            for name, here in sides.items():
                for direction, target, source in (("up", there, here), ("down", here, there)):

                    def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
                        target.copy_(source, non_blocking=True)
                        torch.cuda.synchronize()

                    rates[f"{name} {direction}"] = nbytes / _median(copy, seconds / 4) / 2**30
            columns = [f"{name} {direction}" for direction in ("up", "down") for name in sides]
            table.row(size_text(nbytes), *[f"{rates[column]:.1f}" for column in columns])
            result[str(nbytes)] = rates
            del sides
        torch.cuda.synchronize()
        unpin()
    table.show()
    return result


@contextlib.contextmanager
def _process(*command: str, service: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", *command])
    try:
        with shmbroker.connect(arena="1M") as client:
            client.channel(service, wait=300.0).close()
        yield
    finally:
        stop_process(process)


def _round_trips(seconds: float) -> dict[str, Any]:
    """8 MiB to a worker that doubles it and back: over shared memory and the bus twice, and in the device arena."""
    table = Table(f"round trip of {size_text(ROUND_TRIP_BYTES)}", ["tensors lie in", "us"])
    result: dict[str, Any] = {}
    with _process("benchmarks.cuda", service="cuda-bench"), shmbroker.connect(arena=256 << 20) as client:
        double = client.channel("cuda-bench").bind("double")
        shape = (ROUND_TRIP_BYTES // 4,)
        cases = {"shared memory": client.empty(shape).fill_(1.0)}
        try:
            client.device_arena(256 << 20)
            cases["device arena (CUDA IPC)"] = client.empty(shape, device="cuda").fill_(1.0)
        except ShmBrokerError as error:
            click.echo(f"no device arena: {error}")
        for name, x in cases.items():
            result[name] = _median(lambda x=x: double(x), seconds) * 1e6
            table.row(name, f"{result[name]:.1f}")
    table.show()
    return result


def _prefills() -> dict[str, Any]:
    """The embedded model, 512 tokens, against the same model on the same GPU in one process."""
    folder = embedded.ensure()
    ids = torch.arange(PREFILL_TOKENS).unsqueeze(0) + 1000
    table = Table(f"prefill of {PREFILL_TOKENS} tokens, SmolLM2-135M", ["split", *[f"{dtype} ms" for dtype in DTYPES]])
    result: dict[str, Any] = {}
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            whole = Checkpoint.at(folder).model(dtype).to("cuda:0")  # type: ignore[arg-type]

            def in_one(whole: Any = whole) -> None:
                whole(ids.cuda(), use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()

            result[f"in one process {name}"] = _median(in_one, 1.0) * 1e3
            del whole
            serve = ("gpu_worker", "serve", "--model", str(folder), "--device", "cuda:0", "--dtype", name, "--service", f"prefill-{name}")
            with _process(*serve, service=f"prefill-{name}"):
                for split in Split:
                    with shmbroker.connect(arena=1 << 30) as client:
                        parts = own_part(Checkpoint.at(folder), dtype, split)
                        offload(parts, client.channel(f"prefill-{name}"), split)
                        ours = _median(lambda parts=parts: parts(ids, use_cache=True, logits_to_keep=1), 1.0)
                        result[f"{split.value} {name}"] = ours * 1e3
    for row in ("in one process", *[split.value for split in Split]):
        table.row(row, *[f"{result[f'{row} {name}']:.1f}" for name in DTYPES])
    table.show()
    return result


def _serve() -> None:
    """The peer of the round trips."""
    from gpu_worker.cuda.device import open_cuda
    from shmbroker import TensorSpec

    device = open_cuda("cuda:0")
    worker = shmbroker.Worker("cuda-bench", device=device.name, memory=device.memory)

    def double(x: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.mul(x, 2, out=out)

    worker.op("double", out_spec=lambda x: TensorSpec(x.shape, x.dtype))(device.staged(double))
    with torch.no_grad():
        worker.serve()


if __name__ == "__main__":
    _serve()
