"""Queues of ``torch.multiprocessing``, with a new tensor each time and with the same one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.machine import PEER_CPU, pin
from benchmarks.measure import Call
from benchmarks.peer import READY

END_SECONDS = 5.0


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[dict[str, Call]]:
    """``new`` and ``reused``."""
    context = torch.multiprocessing.get_context("spawn")
    there, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=serve, args=(there, back), daemon=True)
    process.start()
    try:
        while back.empty():
            process.join(0.01)
            if not process.is_alive():
                raise RuntimeError("the peer of torch.multiprocessing did not start; its own words are above")
        back.get()
        same = torch.ones(nbytes, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

        def new() -> torch.Tensor:
            there.put(torch.ones(nbytes, dtype=torch.uint8))
            answer: torch.Tensor = back.get()
            return answer

        def reused() -> torch.Tensor:
            there.put(same)
            answer: torch.Tensor = back.get()
            return answer

        yield {"new": Call(new), "reused": Call(reused)}
    finally:
        there.put(None)
        process.join(END_SECONDS)
        process.kill()


def serve(there: Any, back: Any) -> None:
    """The peer, until None comes. Started by ``torch.multiprocessing``."""
    pin(PEER_CPU)
    answers: dict[int, torch.Tensor] = {}
    back.put(READY)
    while (tensor := there.get()) is not None:
        size = tensor.numel()
        del tensor
        back.put(answers.setdefault(size, torch.zeros(size, dtype=torch.uint8)))
