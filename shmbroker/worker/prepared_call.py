"""A call that need only be run: its frame is checked, its tensors are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shmbroker.worker.ops import BoundOp, Static


class PreparedCall:
    """A frame that was checked, with its tensors: when the same one comes again, byte for byte, it need only be run.

    The tensors have version counters of their own. An op that changes an input in place (its values, or its shape as ``t_()`` does) is seen
    by that, and its call is not kept.
    """

    __slots__ = ("inputs", "repeatable", "run", "versions")

    def __init__(
        self,
        op: BoundOp,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        arguments: Static,
        *,
        single: bool,
        repeatable: bool,
    ) -> None:
        telling = not any(tensor.is_inference() for tensor in inputs)  # those made in inference mode do not tell when they were changed
        self.inputs = tuple(inputs) if telling else ()
        self.versions = [tensor._version for tensor in self.inputs]
        """Of the inputs, while nothing has changed them."""
        self.run: Callable[[], object] = op.prepare(inputs, outputs, arguments, single=single)
        self.repeatable = repeatable and telling
        """Per-call arguments lie behind what a frame is recognised by."""
