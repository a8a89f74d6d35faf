"""Where a model comes from, as the command lines of both workers give it: a checkpoint, or a shape and a seed."""

from __future__ import annotations

from shmbroker.errors import BadInput
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.models.random_model import RandomModel

ModelSource = Checkpoint | RandomModel


def model_source(model: str | None, shape: str | None, seed: int) -> ModelSource:
    """The checkpoint at ``model``, or random weights of ``shape`` from ``seed``. Raises :class:`BadInput` unless it is one of them."""
    if (model is None) == (shape is None):
        raise BadInput("give --model DIR for a checkpoint, or --shape NAME for random weights of a known shape: one of them")
    return RandomModel(shape, seed) if shape is not None else Checkpoint.at(str(model))
