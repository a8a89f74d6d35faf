"""Whether a pass is asked for the weights of attention: models tell their attentions so in many ways, and the caller tells the model in one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch import nn

from shmbroker.errors import BadInput
from tee_worker.offloading.uncompiled import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASKED = "output_attentions"

_HERE = threading.local()


def wanted() -> bool:
    """Whether the pass that this thread runs is asked for them."""
    return bool(getattr(_HERE, "asked", 0))


def watch(model: PreTrainedModel, moved: str | None, advice: str) -> None:
    """Note when ``model``, or its decoder, is asked for them. ``moved``: a layer whose attention is elsewhere, which has none to give: refused; None: none."""

    def asked(module: nn.Module, kwargs: dict[str, Any]) -> bool:
        told = kwargs.get(ASKED)
        return bool(getattr(module.config, ASKED, False) if told is None else told)

    @uncompiled
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not asked(module, kwargs):
            return
        if moved is not None:
            raise BadInput(f"{ASKED}: the weights of the attention in {moved} stay on the GPU worker: {advice}")
        _HERE.asked = getattr(_HERE, "asked", 0) + 1

    @uncompiled
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if wanted() and asked(module, kwargs):
            _HERE.asked -= 1

    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    for module in (model, decoder) if hasattr(decoder, "config") else (model,):
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True, always_call=True)
