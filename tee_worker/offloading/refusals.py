"""What cannot be done with a model any more once its modules are elsewhere: refused in one line each, before anything is changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFUSED = {
    "save_pretrained": "would write a checkpoint without the weights that are on the GPU worker: save the model before offload()",
    "push_to_hub": "would upload a checkpoint without the weights that are on the GPU worker: do it before offload()",
    "resize_token_embeddings": "would change an embedding that is on the GPU worker: resize, save, and start the GPU worker with the result",
    "load_adapter": "would change modules that are on the GPU worker: load adapters before offload()",
    "add_adapter": "would change modules that are on the GPU worker: add adapters before offload()",
    "quantize": "would change weights that are on the GPU worker: do it before offload()",
    "load_state_dict": "would load what is left here alone: load before offload(), and start the GPU worker with the same weights",
    "tie_weights": "would tie weights that are on the GPU worker",
    "__deepcopy__": "of a split model would be two models on one channel: offload() another one",
    "__reduce_ex__": "of a split model would lack the weights that are on the GPU worker: pickle the model before offload()",
}
"""Methods of a model, and why not."""


def install_refusals(model: PreTrainedModel, dtype: torch.dtype, dropout: str | None) -> None:
    """Have ``model`` refuse these, moving and casting, and training with dropout that would be left out. ``dropout``: the module that has it; None: none."""
    for name, why in REFUSED.items():
        if hasattr(model, name) or name.startswith("__"):
            setattr(model, name, _refusing(name.strip("_"), why))
    seen = weakref.ref(model)
    kind = type(model)

    def train(mode: bool = True) -> Any:
        if mode and dropout is not None:
            raise no_dropout(dropout)
        return kind.train(_alive(seen), mode)

    def apply(function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = torch.zeros(1, dtype=dtype)
        after = function(before)
        if after.dtype is not dtype or after.device != before.device:
            raise BadInput(
                f"a split model stays as it was moved, in {str(dtype).removeprefix('torch.')} and with its own part on the CPU: to() another dtype or "
                "device comes before offload(), and the GPU worker is started with the same --dtype"
            )
        return kind._apply(_alive(seen), function, recurse)  # type: ignore[no-untyped-call]

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.get("destination") is None:  # nobody collects those of a larger whole, an adapter's for one
            raise BadInput("state_dict would lack the weights that are on the GPU worker: take it before offload()")
        return kind.state_dict(_alive(seen), *args, **kwargs)

    model.state_dict = state_dict  # type: ignore[method-assign]
    model.train = train  # type: ignore[method-assign]
    model._apply = apply  # type: ignore[method-assign]


def dropout_in(modules: dict[str, nn.Module]) -> str | None:
    """The first of ``modules``, by name, that draws at random in training."""
    for name, module in modules.items():
        for inner_name, inner in module.named_modules():
            rates = [inner.p] if isinstance(inner, nn.Dropout) else [rate for what, rate in vars(inner).items() if "drop" in what]
            if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
                return f"{name}.{inner_name}".rstrip(".")
    return None


def _alive(seen: Callable[[], PreTrainedModel | None]) -> PreTrainedModel:
    model = seen()
    assert model is not None
    return model


def no_dropout(name: str) -> BadInput:
    """The error for a module ``name`` whose dropout would be left out."""
    return BadInput(f"{name} has dropout, which would be left out on the GPU worker: call eval(), or use split 'fused' or 'linear'")


def _refusing(name: str, why: str) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> Any:
        raise BadInput(f"{name} {why}")

    return refuse
