"""How the model's attention modules find the split attention: through Hugging Face's two registries.

Both are needed: a name that is registered as an attention but not as a mask gets no mask, and causality is silently lost.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput
from tee_worker.offloading.attention_weights import wanted
from tee_worker.offloading.remote_modules import SplitAttention
from tee_worker.offloading.uncompiled import uncompiled
from tee_worker.planning.run_once import unknown_arguments
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "shmbroker_split"
ATTRIBUTE = "shmbroker_attention"
"""Where an attention module keeps its :class:`SplitAttention`."""


@uncompiled
def split_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As Hugging Face calls it: query ``[batch, heads, tokens, head_dim]``, a mask of numbers or booleans, or None, sinks ``[heads]``."""
    attention: SplitAttention | None = getattr(module, ATTRIBUTE, None)
    if attention is None:
        raise BadInput("this model has the configuration of a split one, and was not split: set_attn_implementation('sdpa')")
    refused = unknown_arguments(kwargs)
    if refused or dropout:
        raise BadInput(
            f"split 'op' does not know how to apply {', '.join(refused) or 'dropout'}: use split 'fused' or 'linear' for this model"
        )
    if attention_mask is None and query.shape[2] > 1 and kwargs.get("is_causal") is not False:
        raise BadInput("split 'op': this model gives its attention no mask over several tokens: use split 'fused' or 'linear'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype is torch.bool and attention.eager:
        raise BadInput(
            "split 'op': this model's own attention (eager) would add a mask of booleans as 0 and 1: give one of numbers, or load the model with "
            "attn_implementation='sdpa'"
        )
    return attention(query, key, value, attention_mask, scale, softcap, sinks=s_aux, weights=wanted())


def install_split_attention(model: PreTrainedModel, products: SplitAttention, structure: Structure, splits: Splits) -> None:
    """Have the attentions of the layers at split ``op`` computed by ``products``; the others go on as they were, with the same additive mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, split_attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    modules = dict(model.named_modules())
    model.set_attn_implementation(NAME)
    for part in structure.attentions:
        if structure.moves_whole(part.name, splits):
            continue
        module = modules[part.name]
        if structure.split_of(part.name, splits) is Split.OP:
            setattr(module, ATTRIBUTE, products)
        else:
            module.config = copy.copy(module.config)
            module.config._attn_implementation = before
