"""The three queues of work of a CUDA device: copies up, arithmetic, copies down."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol

import torch


class Line(Enum):
    """Which queue."""

    UP = "up"
    COMPUTE = "compute"
    DOWN = "down"


class Event(Protocol):
    """A mark in a queue."""

    def synchronize(self) -> None:
        """Wait until the queue has come there, without the interpreter lock and without burning a core. Raises what failed before it."""


class Streams(Protocol):
    """What staging asks of a device."""

    def on(self, line: Line) -> AbstractContextManager[object]:
        """What torch launches in the block goes to this queue."""

    def mark(self, line: Line) -> Event:
        """Here."""

    def after(self, line: Line, event: Event) -> None:
        """What comes in this queue waits for ``event``."""


class CudaStreams:
    """A stream of its own for each."""

    def __init__(self, device: torch.device) -> None:
        self._streams = {line: torch.cuda.Stream(device) for line in Line}  # type: ignore[no-untyped-call]

    def on(self, line: Line) -> AbstractContextManager[object]:
        """See :class:`Streams`."""
        on: AbstractContextManager[object] = torch.cuda.stream(self._streams[line])
        return on

    def mark(self, line: Line) -> Event:
        """See :class:`Streams`. ``blocking``: who waits sleeps (cudaEventBlockingSync)."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._streams[line])
        return event

    def after(self, line: Line, event: Event) -> None:
        """See :class:`Streams`."""
        assert isinstance(event, torch.cuda.Event)
        self._streams[line].wait_event(event)
