"""All that is the same for every call with inputs of the same form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from shmbroker.arena.room import Room
from shmbroker.arena.spec import contiguous_strides, spec_of
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.outputs import Outputs
from shmbroker.memory.layout import Space

if TYPE_CHECKING:
    from shmbroker.call.statistics import OpStatistics
    from shmbroker.client.channel import Channel


class Plan:
    """All that is the same for every call with inputs of the same shapes, dtypes and strides."""

    __slots__ = (
        "before",
        "buckets",
        "bytes_in",
        "bytes_out",
        "channel",
        "output_space",
        "rooms",
        "single",
        "specs",
        "statistics",
        "template",
    )

    def __init__(
        self,
        channel: Channel,
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
        self.channel = channel
        self.statistics = statistics
        self.buckets = channel.buckets
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
        self.bytes_out = sum(tensor.nbytes for tensor in handed)
        self.bytes_in = 0 if output_space == Space.KEPT else sum(spec.nbytes for spec in outputs.specs)
