"""The splits: how much of a layer the GPU worker computes, from most to least private."""

from __future__ import annotations

import enum

from shmbroker.errors import BadInput


class Split(str, enum.Enum):
    """What is one call."""

    LINEAR = "linear"
    """Each linear layer alone."""
    FUSED = "fused"
    """Linear layers that take the same input together: q+k+v, o, gate+up, down. Attention stays in the TEE."""
    OP = "op"
    """As ``fused``, and the two matrix products of attention; softmax stays in the TEE."""

    LAYER = "layer"
    """A whole decoder layer, its keys and values kept on the worker: one call each."""

    @classmethod
    def named(cls, name: str) -> Split:
        """``"op"`` to ``Split.OP``. Raises :class:`BadInput` with the names there are."""
        try:
            return cls(name)
        except ValueError:
            raise BadInput(f"split {name!r} is not known; there are: {', '.join(split.value for split in cls)}") from None
