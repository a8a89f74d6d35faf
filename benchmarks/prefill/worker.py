"""The worker of the replayed prefill: it answers every call and computes nothing. A peer (:mod:`benchmarks.peer`)."""

from __future__ import annotations

import sys
from typing import Any

import torch

import shmbroker
from benchmarks.contenders.ours import SPIN
from benchmarks.peer import be_peer, ready
from shmbroker import TensorSpec


def serve(largest: str) -> None:
    """``largest``: elements of the largest output."""
    torch.set_num_threads(1)
    elsewhere = torch.ones(int(largest))
    worker = shmbroker.Worker("replay", spin=SPIN)

    @worker.op(out_spec=lambda *inputs, shapes: [TensorSpec(shape, torch.float32) for shape in shapes])
    def replay(*inputs: torch.Tensor, out: Any, shapes: list[list[int]]) -> None:
        pass

    @worker.op(out_spec=lambda *inputs, shapes: [TensorSpec(shape, torch.float32) for shape in shapes])
    def copied(*inputs: torch.Tensor, out: Any, shapes: list[list[int]]) -> None:
        """The worker's own results lie elsewhere and are copied out."""
        for room in [out] if isinstance(out, torch.Tensor) else out:
            room.view(-1).copy_(elsewhere[: room.numel()])

    @worker.op(out_spec=lambda *inputs, shapes, number: [*(TensorSpec(s, torch.float32) for s in shapes), TensorSpec((), torch.float64)])
    def touched(*inputs: torch.Tensor, out: Any, shapes: list[list[int]], number: int) -> None:
        """Reads every byte of every input and writes every byte of every output."""
        *rooms, checksum = out
        for room in rooms:
            room.fill_(number % 7)
        checksum.fill_(sum(checksum_of(x) for x in inputs))

    worker.serve(ready)


def checksum_of(tensor: torch.Tensor) -> float:
    """A sum over all of a tensor's bytes as 32-bit integers, exact in a double for the sizes used here."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.transpose(-1, -2).reshape(-1)
    return float(flat.view(torch.int32).sum(dtype=torch.int64))


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
