"""Python's own ``multiprocessing.shared_memory``: two buffers, views of them made by hand, and a Pipe to take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import connection, shared_memory

import torch

from benchmarks.machine import PEER_CPU, pin
from benchmarks.measure import Call
from benchmarks.peer import READY

END_SECONDS = 5.0


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[Call]:
    """One tensor there and one back."""
    context = multiprocessing.get_context("spawn")
    block = shared_memory.SharedMemory(create=True, size=2 * nbytes)
    pipe, other = context.Pipe()
    process = context.Process(target=serve, args=(block.name, other), daemon=True)
    process.start()
    try:
        pipe.recv()

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            sent = torch.frombuffer(block.buf, dtype=torch.uint8, count=nbytes)
            pipe.send(nbytes)
            pipe.recv()
            return sent, torch.frombuffer(block.buf, dtype=torch.uint8, count=nbytes, offset=nbytes)

        yield Call(call)
    finally:
        pipe.send(None)
        process.join(END_SECONDS)
        process.kill()
        block.close()
        block.unlink()


def serve(name: str, pipe: connection.Connection) -> None:
    """The peer, until None comes. Started by ``multiprocessing``."""
    pin(PEER_CPU)
    block = shared_memory.SharedMemory(name)
    pipe.send(READY)
    while (size := pipe.recv()) is not None:
        torch.frombuffer(block.buf, dtype=torch.uint8, count=size)
        torch.frombuffer(block.buf, dtype=torch.uint8, count=size, offset=size)
        pipe.send(size)
    os._exit(0)  # the views outlive the block's own bookkeeping, which would complain
