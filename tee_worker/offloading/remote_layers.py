"""Whole decoder layers, and their halves, on the GPU worker: what stands in their place here."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from shmbroker.client import Op
from tee_worker.offloading.sessions import Sessions


class _Remote(nn.Module):
    """Mixed into a module's own class, which its model may look at; its parts are gone."""

    op: Op
    index: int
    sessions: Sessions
    signature: inspect.Signature

    def _run(self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if args:
            kwargs.update(self.signature.bind(hidden_states, *args, **kwargs).arguments)
        cache = kwargs.get("past_key_values") if kwargs.get("use_cache", True) else None
        return self.sessions.run(self.op, self.index, hidden_states, kwargs.get("position_ids"), kwargs.get("attention_mask"), cache)


class RemoteLayer(_Remote):
    """A whole decoder layer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One call; arguments as the layer's own."""
        return self._run(hidden_states, args, kwargs)


class RemoteAttention(_Remote):
    """A layer's attention."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """One call; arguments as the attention's own."""
        return self._run(hidden_states, args, kwargs), None


class RemoteFeedForward(nn.Module):
    """A layer's feed-forward: ``[batch, tokens, width]`` to the same."""

    op: Op

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """One call."""
        output: torch.Tensor = self.op(hidden_states)
        return output


def make_remote(module: nn.Module, mixin: type[_Remote], op: Op, index: int, sessions: Sessions) -> None:
    """Turn a layer, or its attention, into one that is computed elsewhere, and let its weights go."""
    signature = inspect.signature(module.forward)
    become(module, mixin, op)
    module.index = index  # type: ignore[assignment]
    module.sessions = sessions  # type: ignore[assignment]
    module.signature = signature  # type: ignore[assignment]


def become(module: nn.Module, mixin: type[nn.Module], op: Op) -> None:
    """Mix ``mixin`` into the class of ``module``, and let its parts go."""
    kind = type(module)
    for name, _ in list(module.named_children()):
        delattr(module, name)
    for name, _ in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)
    module.__class__ = type(kind.__name__, (mixin, kind), {})
    module.op = op  # type: ignore[assignment]
