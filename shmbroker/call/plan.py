"""All that is the same for every call with inputs of the same form, worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from shmbroker.arena.room import Room
from shmbroker.arena.spec import contiguous_strides, spec_of
from shmbroker.call.completions import CompletionLoop, Waitable
from shmbroker.call.statistics import OpStatistics
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.outputs import Outputs
from shmbroker.memory.layout import Space


class Carrier(Protocol):
    """What carries calls to a worker and brings their completions, as a call sees it: a queue pair."""

    worker_name: str
    buckets: list[int]
    """Histogram of the calls' times, as of :func:`~shmbroker.call.statistics.no_calls`."""
    completions: CompletionLoop
    """Where its completions are waited for."""

    def peer_text(self) -> str:
        """The worker, for messages."""

    def look(self, call: Waitable) -> bool:
        """Take what completions there are, without waiting, and fail ``call`` when its deadline has passed; whether it is done or has failed."""

    def wait(self, call: Waitable, timeout: float | None = None) -> bool:
        """Wait until ``call`` is done. Its own deadline fails it; an earlier ``timeout`` (seconds) only ends the waiting: False."""


class Plan:
    """All that is the same for every call with inputs of the same shapes, dtypes and strides."""

    __slots__ = (
        "before",
        "buckets",
        "carrier",
        "output_space",
        "received_bytes",
        "rooms",
        "sent_bytes",
        "single",
        "specs",
        "statistics",
        "template",
    )

    def __init__(
        self,
        carrier: Carrier,
        statistics: OpStatistics,
        op_id: int,
        inputs: Sequence[torch.Tensor],
        outputs: Outputs,
        arguments: bytes,
        spaces: Sequence[int] = (),
        output_space: int = Space.SEGMENT,
        before: Callable[[], None] | None = None,
    ) -> None:
        """``spaces`` of the inputs, where not all lie in the segment; ``before``: what to do before such a call is published."""
        self.carrier = carrier
        self.statistics = statistics
        self.buckets = carrier.buckets
        self.template = FrameTemplate(
            op_id,
            [(spec_of(tensor), tensor.stride()) for tensor in inputs],
            [(spec, contiguous_strides(spec.shape)) for spec in outputs.specs],
            arguments,
            (*(spaces or (Space.SEGMENT,) * len(inputs)), *(output_space,) * len(outputs.specs)) if spaces or output_space else (),
        )
        self.specs = outputs.specs
        self.rooms = tuple(Room(spec.shape, spec.dtype) for spec in outputs.specs)
        self.single = outputs.single
        self.output_space = output_space
        self.before = before
        handed = [
            tensor for index, tensor in enumerate(inputs) if not spaces or spaces[index] != Space.KEPT
        ]  # what is kept stays where it is
        self.sent_bytes = sum(tensor.nbytes for tensor in handed)
        self.received_bytes = 0 if output_space == Space.KEPT else sum(spec.nbytes for spec in outputs.specs)
