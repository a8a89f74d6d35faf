"""The ops by which a transformer is split: names and shape rules, imported by both sides so that no shape need be asked.

Every rule is an ``out_spec``: from the inputs' specs and the arguments fixed at bind to the outputs' specs. ``digests``: of the parameters that the
client has of the module, by their names in it; empty where it has none of them. The worker refuses to bind what it holds others of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shmbroker.arena.spec import TensorSpec, dtype_named
from shmbroker.errors import BadInput

EMBED = "embed"
LINEAR = "linear"
BATCH_LINEAR = "batch_linear"
MATMUL = "matmul"
LM_HEAD = "lm_head"
ATTENTION_BLOCK = "attention_block"
MLP_BLOCK = "mlp_block"
FULL_LAYER = "full_layer"
RING_LINEAR = "ring_linear"

Digests = Mapping[str, str]

NO_DIGESTS: Digests = {}

SESSION_WORDS = 2
"""A session's tensor, int64: its number (0 for none), and the tokens that it has seen at the layer."""


def embed(ids: TensorSpec, *, module: str, width: int, dtype: str, digests: Digests = NO_DIGESTS) -> TensorSpec:
    """``[...]`` token ids, int64, to ``[..., width]`` of ``dtype``: the rows of the embedding ``module``."""
    return TensorSpec((*ids.shape, width), dtype_named(dtype))


def linear(x: TensorSpec, *, module: str, in_features: int, out_features: int, digests: Digests = NO_DIGESTS) -> TensorSpec:
    """``[..., in_features]`` to ``[..., out_features]``: ``x @ weight.T + bias`` of the linear layer ``module``."""
    _check_width(x, in_features, module)
    return TensorSpec((*x.shape[:-1], out_features), x.dtype)


def batch_linear(
    x: TensorSpec, *, modules: Sequence[str], in_features: int, out_features: Sequence[int], digests: Sequence[Digests] = ()
) -> tuple[TensorSpec, ...]:
    """``[..., in_features]`` through several linear layers that take the same input, one output each."""
    _check_width(x, in_features, ", ".join(modules))
    return tuple(TensorSpec((*x.shape[:-1], width), x.dtype) for width in out_features)


def ring_linear(
    x: TensorSpec,
    *,
    modules: Sequence[str],
    in_features: int,
    out_features: Sequence[int],
    bits: int,
    digests: Sequence[Digests] = (),
) -> TensorSpec:
    """``[..., in_features]``, int32, through several linear layers that take the same input, side by side: ``[..., sum of out_features]``, int32.

    ``x @ integers.T`` modulo 2^32, the integers being the weights at ``bits`` for each output (:mod:`shmbroker.trust.quantization`); no bias.
    """
    _check_width(x, in_features, ", ".join(modules))
    if x.dtype is not torch.int32:
        raise BadInput(f"{RING_LINEAR} takes int32, not {x}")
    return TensorSpec((*x.shape[:-1], sum(out_features)), torch.int32)


def matmul(a: TensorSpec, b: TensorSpec) -> TensorSpec:
    """``[..., m, k] @ [..., k, n]`` to ``[..., m, n]``, equal leading dimensions, one dtype."""
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        raise BadInput(f"matmul takes [..., m, k] and [..., k, n] of one dtype, not {a} and {b}")
    return TensorSpec((*a.shape[:-1], b.shape[-1]), a.dtype)


def full_layer(
    hidden_states: TensorSpec, position_ids: TensorSpec, session: TensorSpec, *mask: TensorSpec, layer: int, digests: Digests = NO_DIGESTS
) -> TensorSpec:
    """The decoder layer ``layer``: ``[batch, tokens, width]``, position ids ``[1 or batch, tokens]`` and the session ``[2]``, int64, to ``[batch, tokens, width]``.

    ``mask``: none, or one ``[batch, 1, tokens, length]`` as the model's attention takes it. The keys and values of earlier tokens are the worker's.
    """
    if (
        len(hidden_states.shape) != 3
        or position_ids.shape[-1:] != hidden_states.shape[1:2]
        or session.shape != (SESSION_WORDS,)
        or len(mask) > 1
    ):
        raise BadInput(
            f"{FULL_LAYER} and {ATTENTION_BLOCK} take [batch, tokens, width], [1 or batch, tokens], [{SESSION_WORDS}] and at most one mask, not "
            f"{hidden_states}, {position_ids}, {session}"
        )
    return hidden_states


attention_block = full_layer
"""The attention of the decoder layer ``layer``, with its projections: as :func:`full_layer`."""


def mlp_block(hidden_states: TensorSpec, *, layer: int, digests: Digests = NO_DIGESTS) -> TensorSpec:
    """``[batch, tokens, width]`` through the feed-forward of the decoder layer ``layer``."""
    return hidden_states


def _check_width(x: TensorSpec, in_features: int, module: str) -> None:
    if not x.shape or x.shape[-1] != in_features:
        raise BadInput(f"{module} takes [..., {in_features}], not {x}")
