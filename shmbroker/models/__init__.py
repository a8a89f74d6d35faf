"""Hugging Face checkpoints as both workers need them: loading, shapes of their ops, random weights. Programs import what they need of it from here.

None of it imports transformers before a model is made.
"""

from shmbroker.models.checkpoint import Checkpoint, missing_parameters, model_dtype
from shmbroker.models.digests import digest_of, digests_of, model_digest
from shmbroker.models.layer_call import LayerCall, first_of
from shmbroker.models.parts import (
    LayerHalves,
    adapters,
    cache_parameter,
    decoder_layers,
    features,
    halves_of,
    is_linear,
    name_without_adapter,
    rotary_of,
    tee_part,
    weight_and_bias,
)
from shmbroker.models.source import ModelSource, model_source

__all__ = [
    "Checkpoint",
    "LayerCall",
    "LayerHalves",
    "ModelSource",
    "adapters",
    "cache_parameter",
    "decoder_layers",
    "digest_of",
    "digests_of",
    "features",
    "first_of",
    "halves_of",
    "is_linear",
    "missing_parameters",
    "model_digest",
    "model_dtype",
    "model_source",
    "name_without_adapter",
    "rotary_of",
    "tee_part",
    "weight_and_bias",
]
