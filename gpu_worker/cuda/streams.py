"""The three streams of a CUDA device, its queues of work: copies up, arithmetic, copies down."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol

import torch


class StreamKind(Enum):
    """What a stream is for."""

    UP = "up"
    COMPUTE = "compute"
    DOWN = "down"


class Event(Protocol):
    """A mark in a stream."""

    def synchronize(self) -> None:
        """Wait until the stream has come there, without the interpreter lock and without burning a core. Raises what failed before it."""


class Streams(Protocol):
    """What staging asks of a device."""

    def on(self, kind: StreamKind) -> AbstractContextManager[object]:
        """What torch launches in the block goes to this stream."""

    def mark(self, kind: StreamKind) -> Event:
        """A mark here: behind all that the stream has been given."""

    def after(self, kind: StreamKind, event: Event) -> None:
        """What comes in this stream waits for ``event``."""


class CudaStreams:
    """A stream of its own for each."""

    def __init__(self, device: torch.device) -> None:
        self._streams = {kind: torch.cuda.Stream(device) for kind in StreamKind}  # type: ignore[no-untyped-call]

    def on(self, kind: StreamKind) -> AbstractContextManager[object]:
        """See :class:`Streams`."""
        on: AbstractContextManager[object] = torch.cuda.stream(self._streams[kind])
        return on

    def mark(self, kind: StreamKind) -> Event:
        """See :class:`Streams`. ``blocking``: who waits sleeps (cudaEventBlockingSync)."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._streams[kind])
        return event

    def after(self, kind: StreamKind, event: Event) -> None:
        """See :class:`Streams`."""
        assert isinstance(event, torch.cuda.Event)
        self._streams[kind].wait_event(event)
