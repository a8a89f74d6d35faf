"""Our own way: a worker whose op does nothing, called over each lane."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import torch

import shmbroker
from benchmarks.measure import Call
from benchmarks.peer import be_peer, peer, ready
from shmbroker.client.channel import Channel

SPIN = 50e-6
"""Seconds; the default of clients and workers."""


def worker(spin: float = SPIN) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """A worker of service ``echo`` with an op of that name, ready. Within a broker's block."""
    return peer("contenders.ours", str(spin))


@contextlib.contextmanager
def channels(nbytes: int, lane: str = "shm", doorbell: str = "auto", spin: float = SPIN) -> Iterator[tuple[shmbroker.Client, Channel]]:
    """A client with room for some tensors of ``nbytes``, and its channel to such a worker."""
    with shmbroker.local_broker(), worker(spin), shmbroker.connect(arena=8 * nbytes + (64 << 20), spin=spin) as client:
        yield client, client.channel("echo", lane=lane, doorbell=doorbell)


@contextlib.contextmanager
def calls(nbytes: int, lane: str = "shm", doorbell: str = "auto", spin: float = SPIN) -> Iterator[dict[str, Call]]:
    """``call`` (input in the arena, fresh output), ``replay`` (captured), ``copied in`` (input outside the arena)."""
    with channels(nbytes, lane, doorbell, spin) as (client, channel):
        op = channel.bind("echo", out_spec=lambda x: x)
        inside = client.empty((nbytes,), torch.uint8).fill_(1)
        outside = torch.ones(nbytes, dtype=torch.uint8)
        captured = op.capture(inside)
        yield {"call": Call(lambda: op(inside)), "replay": Call(captured.replay), "copied in": Call(lambda: op(outside))}


def serve(spin: str) -> None:
    """The worker: its outputs are fresh blocks that it could have written."""
    torch.set_num_threads(1)
    worker = shmbroker.Worker("echo", spin=float(spin))

    @worker.op(out_spec=lambda x: shmbroker.TensorSpec(x.shape, x.dtype))
    def echo(x: torch.Tensor, *, out: torch.Tensor) -> None:
        pass

    @worker.op(out_spec=lambda x, y: shmbroker.TensorSpec(x.shape, x.dtype))
    def two_inputs(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor) -> None:
        pass

    @worker.op(out_spec=lambda x: (shmbroker.TensorSpec(x.shape, x.dtype), shmbroker.TensorSpec(x.shape, x.dtype)))
    def two_outputs(x: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        pass

    worker.serve(ready)


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
