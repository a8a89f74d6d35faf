"""Which modules of a decoder are the GPU worker's: its linear layers and its token embedding. Both programs must agree on it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: ``nn.Linear``, or GPT-2's ``Conv1D``, which is one with its weight the other way round."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, also of one without weights."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Weight and bias of a linear layer, and whether the weight is ``[in, out]`` (else ``[out, in]``)."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    return weight, bias, not isinstance(module, nn.Linear)


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their names: the one list of modules that has as many as the configuration says. Empty when there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [(name, found) for name, found in model.named_modules() if isinstance(found, nn.ModuleList) and len(found) == count]
    return [(f"{lists[0][0]}.{index}", layer) for index, layer in enumerate(lists[0][1])] if len(lists) == 1 else []


@dataclass(frozen=True, slots=True)
class LayerHalves:
    """The two halves of a decoder layer, as names of its children: what attends (and keeps keys and values), and what follows."""

    attention: str
    feed_forward: str


def halves_of(layer: nn.Module) -> LayerHalves | None:
    """Told by what they take: the attention is the child that is given the cache, the feed-forward the other one that has parts of its own.

    None where a layer is made otherwise.
    """
    children = dict(layer.named_children())
    attentions = [name for name, child in children.items() if "past_key_values" in inspect.signature(child.forward).parameters]
    others = [name for name, child in children.items() if name not in attentions and (is_linear(child) or any(child.children()))]
    if len(attentions) != 1 or len(others) != 1 or is_linear(children[others[0]]):
        return None
    return LayerHalves(attentions[0], others[0])


def gpu_part(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the GPU worker loads the parameters of ``module``."""
    return is_linear(module) or module is model.get_input_embeddings()


def tee_part(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the TEE worker does."""
    return not gpu_part(model, module)
