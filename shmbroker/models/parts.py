"""Which modules of a decoder are the GPU worker's: its linear layers and its token embedding. Both programs must agree on it."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
"""What modules call the cache that they are given, where they do not declare that it is one."""

_CACHE = re.compile(r"\b\w*Cache\b")


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x @ weight.T + bias`` and nothing else: an ``nn.Linear``, or GPT-2's ``Conv1D``, whose weight lies the other way round.

    A subclass that computes otherwise (one that quantizes, say), a weight of another kind than a matrix of floating-point numbers, and a module with
    something hooked onto it are none: they stay where they are.
    """
    kind = _plain_kind(module)
    if kind is None or _hooked(module):
        return False
    weight = module._parameters.get("weight", module)
    if weight is None:  # it was not loaded here
        return True
    size = features(module) if kind is not nn.Linear else tuple(reversed(features(module)))
    return (
        isinstance(weight, torch.Tensor)
        and type(weight) in (nn.Parameter, torch.Tensor)
        and weight.is_floating_point()
        and weight.itemsize > 1  # below, a number needs its scale
        and tuple(weight.shape) == size
    )


def _plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """``nn.Linear`` or ``Conv1D``, where the module's ``forward`` is theirs."""
    from transformers.pytorch_utils import Conv1D

    for kind in (nn.Linear, Conv1D):
        if isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module):
            return kind
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


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
    attentions = [name for name, child in children.items() if cache_parameter(child) is not None]
    others = [name for name, child in children.items() if name not in attentions and (is_linear(child) or any(child.children()))]
    if len(attentions) != 1 or len(others) != 1 or is_linear(children[others[0]]):
        return None
    return LayerHalves(attentions[0], others[0])


BASE_LAYER = "base_layer"
"""What adapters (PEFT's) call the module that they stand around."""


def name_without_adapter(name: str) -> str:
    """The name that a module has in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != BASE_LAYER)


def adapters(model: nn.Module) -> dict[nn.Module, str]:
    """All modules that belong to adapters, with the names of the modules that these stand around."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, BASE_LAYER, None), nn.Module):
            found[module] = name
            found.update((inner, name) for child, below in module.named_children() if child != BASE_LAYER for inner in below.modules())
    return found


def cache_parameter(module: nn.Module) -> str | None:
    """The parameter by which a module is given the cache: the one that is declared to be a ``Cache``, else the one that is named as it is in most models."""
    parameters = inspect.signature(module.forward).parameters
    declared = [name for name, parameter in parameters.items() if _CACHE.search(str(parameter.annotation))]
    return declared[0] if declared else next((name for name in CACHE_NAMES if name in parameters), None)


def rotary_of(model: PreTrainedModel) -> nn.Module | None:
    """What turns positions into rotary embeddings, once for all layers; None where there is none."""
    found: nn.Module | None = getattr(model.get_decoder(), "rotary_emb", None)  # type: ignore[no-untyped-call]
    return found


def gpu_part(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the GPU worker loads the parameters of ``module``."""
    return is_linear(module) or module is model.get_input_embeddings()


def tee_part(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the TEE worker does."""
    return not gpu_part(model, module)
