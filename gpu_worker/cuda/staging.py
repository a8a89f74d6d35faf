"""Staging: a call's inputs copied up to the device, its op run there, its results copied down to where the client reads them.

Two calls may be in flight, each with staging memory of its own: while one is computed, the next one's inputs go up and the last one's results come
down. A call is done when its last copy is.

S1  Staging memory is used for a call only when the call that had it before is done.
S2  The op runs after the inputs have arrived, the results go down after the op.
S3  A call that fails is answered only when nothing of it reads or writes the client's memory any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from gpu_worker.cuda.streams import Event, StreamKind, Streams
from shmbroker.memory.layout import ALIGNMENT, round_up

SLOTS = 2
"""Calls in flight. A third would wait for the same two engines and the same arithmetic."""


class Flight:
    """A call that was launched."""

    __slots__ = ("_event",)

    def __init__(self, event: Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Wait until its last copy is done. Raises what went wrong on the device."""
        self._event.synchronize()


class _Slot:
    """Staging memory of one call in flight; it grows to what the largest call needs, and stays."""

    __slots__ = ("flight", "memory", "used")

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.flight: Flight | None = None
        self.used = 0

    def take(self, like: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
        assert self.memory is not None
        nbytes = like.numel() * like.dtype.itemsize
        part = self.memory[self.used : self.used + max(nbytes, like.dtype.itemsize)]
        self.used += _room(like)
        return part.view(like.dtype).as_strided(like.shape, strides)


class Staging:
    """Of one device. ``empty``: bytes there; ``resident``: whether a tensor is there already. Calls are launched by one thread at a time."""

    def __init__(self, streams: Streams, empty: Callable[[int], torch.Tensor], resident: Callable[[torch.Tensor], bool]) -> None:
        self._streams = streams
        self._empty = empty
        self._resident = resident
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._turn = 0

    def staged(self, function: Callable[..., object], on_host: Collection[int] = ()) -> Callable[..., Flight]:
        """``function(*inputs, out=..., **arguments)``, given the client's tensors, run on the device. ``on_host``: inputs that it reads on the CPU."""

        def run(*inputs: torch.Tensor, out: torch.Tensor | tuple[torch.Tensor, ...], **arguments: Any) -> Flight:
            single = isinstance(out, torch.Tensor)
            outs: tuple[torch.Tensor, ...] = (out,) if isinstance(out, torch.Tensor) else tuple(out)
            return self._launch(function, inputs, outs, single, on_host, arguments)

        return run

    def _launch(
        self,
        function: Callable[..., object],
        inputs: tuple[torch.Tensor, ...],
        outs: tuple[torch.Tensor, ...],
        single: bool,
        on_host: Collection[int],
        arguments: dict[str, Any],
    ) -> Flight:
        streams = self._streams
        away = [index not in on_host and not self._resident(tensor) for index, tensor in enumerate(inputs)]
        below = [not self._resident(tensor) for tensor in outs]
        moved = [t for t, is_away in zip(inputs, away, strict=True) if is_away] + [
            t for t, is_below in zip(outs, below, strict=True) if is_below
        ]
        slot = self._free_slot(sum(_room(tensor) for tensor in moved))
        slot.flight = None
        try:
            there = list(inputs)
            with streams.on(StreamKind.UP):
                for index, tensor in enumerate(inputs):
                    if away[index]:
                        there[index] = _copy(slot.take(tensor, _dense_strides(tensor)), tensor)
            streams.after(StreamKind.COMPUTE, streams.mark(StreamKind.UP))
            room = [slot.take(tensor, _contiguous(tensor)) if is_below else tensor for tensor, is_below in zip(outs, below, strict=True)]
            with streams.on(StreamKind.COMPUTE):
                function(*there, out=room[0] if single else tuple(room), **arguments)
            last = streams.mark(StreamKind.COMPUTE)
            if any(below):
                streams.after(StreamKind.DOWN, last)
                with streams.on(StreamKind.DOWN):
                    for tensor, staged, is_below in zip(outs, room, below, strict=True):
                        if is_below:
                            _copy(tensor, staged)
                last = streams.mark(StreamKind.DOWN)
        except BaseException:
            for kind in StreamKind:  # S3
                streams.mark(kind).synchronize()
            raise
        slot.flight = Flight(last)
        return slot.flight

    def _free_slot(self, nbytes: int) -> _Slot:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        if slot.flight is not None:
            try:
                slot.flight.wait()  # S1
            except Exception:  # told by whoever waits for that call
                slot.flight = None
        slot.used = 0
        if nbytes and (slot.memory is None or len(slot.memory) < nbytes):
            slot.memory = None  # before the new one is made: both need not fit
            with self._streams.on(StreamKind.COMPUTE):
                slot.memory = self._empty(nbytes)
            # What had this memory before may be computed with still, and copies up run in another stream.
            self._streams.after(StreamKind.UP, self._streams.mark(StreamKind.COMPUTE))
        return slot


def _room(tensor: torch.Tensor) -> int:
    return round_up(max(tensor.numel(), 1) * tensor.dtype.itemsize, ALIGNMENT)


def _contiguous(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.empty(tensor.shape, device="meta").stride())


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those of the tensor where it has no gaps, so that one plain copy moves it; else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Without waiting where one plain copy does it; torch goes over temporary memory otherwise, which must live until it is done."""
    return target.copy_(source, non_blocking=target.stride() == source.stride())
