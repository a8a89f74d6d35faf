"""What a worker counts of a channel and notes of a call's inputs: by C where the compiled steps are there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from shmbroker.lane.ends import COMPILED


class Watched(Protocol):
    """Inputs as they were while no op had them."""

    def changed(self) -> bool:
        """Whether one is not as it was."""


STEPS_COMPILED = False

if COMPILED:
    try:
        from shmbroker.worker import _steps

        _steps.know_tensors(torch.Tensor, torch._C._storage_Use_Count)
        STEPS_COMPILED = True
    except (AttributeError, ImportError, TypeError):
        pass  # not built, or a torch that tells of its tensors otherwise


def bound(function: Callable[..., object], *arguments: object, **keywords: object) -> Callable[[], object]:
    """``function`` with its arguments, to be called again and again."""
    if STEPS_COMPILED:
        return _steps.Bound(function, arguments, keywords)
    return functools.partial(function, *arguments, **keywords)


WatchedInputs: Callable[[tuple[torch.Tensor, ...], tuple[int, ...]], Watched] | None = _steps.Watched if STEPS_COMPILED else None
"""Notes tensors and their storages; None where steps are not compiled."""

if STEPS_COMPILED and not TYPE_CHECKING:
    from shmbroker.worker._steps import Counters
else:
    from shmbroker.worker.python_counters import Counters


class ChannelCounters(Counters):
    """What a channel has done. Added to without a lock: where two threads add at one instant, one addition may be missing."""

    __slots__ = ()

    def __init__(self) -> None:
        self.calls: int = 0
        self.errors: int = 0
        self.compute_ns: int = 0
        self.queued_ns: int = 0
        self.batched: int = 0
        """Calls that were computed together with those of other clients."""
        self.batched_with: int = 0
        """All calls of the batches that those were in."""
