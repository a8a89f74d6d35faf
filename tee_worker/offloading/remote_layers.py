"""Whole decoder layers, and their halves, on the GPU worker: what stands in their place here."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from shmbroker.client import Op
from tee_worker.offloading.sessions import Sessions
from tee_worker.offloading.uncompiled import uncompiled
from tee_worker.planning.layer_arguments import LayerSignature


class _Remote(nn.Module):
    """Mixed into a module's own class, which its model may look at; its parts are gone."""

    op: Op
    index: int
    sessions: Sessions
    signature: LayerSignature
    results: int | None
    """How many values the module returns as a tuple, the first of which is computed; None: that one alone."""

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One call; arguments as the module's own."""
        output = self.sessions.run(self.op, self.index, self.signature.arguments(args, kwargs))
        return output if self.results is None else (output, *[None] * (self.results - 1))


class RemoteLayer(_Remote):
    """A whole decoder layer."""


class RemoteAttention(_Remote):
    """A layer's attention."""


class RemoteFeedForward(nn.Module):
    """A layer's feed-forward: ``[batch, tokens, width]`` to the same."""

    op: Op
    results: int | None

    @uncompiled
    def forward(self, hidden_states: torch.Tensor) -> Any:
        """One call."""
        output: torch.Tensor = self.op(hidden_states)
        return output if self.results is None else (output, *[None] * (self.results - 1))


def make_remote(module: nn.Module, mixin: type[_Remote], op: Op, index: int, sessions: Sessions, results: int | None) -> None:
    """Turn a layer, or its attention, into one that is computed elsewhere, and let its weights go."""
    signature = LayerSignature(type(module).__name__, inspect.signature(module.forward), sessions.advice)
    become(module, mixin, op, results)
    module.index = index  # type: ignore[assignment]
    module.sessions = sessions  # type: ignore[assignment]
    module.signature = signature  # type: ignore[assignment]


def become(module: nn.Module, mixin: type[nn.Module], op: Op, results: int | None) -> None:
    """Mix ``mixin`` into the class of ``module``, and let its parts go."""
    kind = type(module)
    for name, _ in list(module.named_children()):
        delattr(module, name)
    for name, _ in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)
    module.__class__ = type(kind.__name__, (mixin, kind), {})
    module.op = op  # type: ignore[assignment]
    module.results = results  # type: ignore[assignment]
