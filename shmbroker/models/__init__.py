"""Hugging Face checkpoints as both workers need them: loading, shapes of their ops, random weights.

None of it imports transformers before a model is made.
"""

from shmbroker.models.checkpoint import model_dtype
from shmbroker.models.parts import decoder_layers, halves_of, is_linear, weight_and_bias
from shmbroker.models.source import ModelSource, model_source

__all__ = ["ModelSource", "decoder_layers", "halves_of", "is_linear", "model_dtype", "model_source", "weight_and_bias"]
