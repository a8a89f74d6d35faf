"""The ops of a GPU worker, on whatever device. Weights are looked up at bind; a call only computes, into the client's blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu_worker.device import Device
from gpu_worker.integers import Integers
from gpu_worker.layers import READ_ON_HOST, Layers
from gpu_worker.weights import Weights
from shmbroker.models import ops
from shmbroker.worker import Worker


class Linear:
    """Linear layers with the same input ``[..., in_features]``; ``out``: one tensor, or one for each layer."""

    def __init__(self, device: Device, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], in_features: int) -> None:
        self._device = device
        self._layers = layers
        self._in_features = in_features

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """All at once."""
        self._device.linear(x.reshape(-1, self._in_features), self._layers, _flat(out))

    def tiles(self, x: torch.Tensor, *, out: torch.Tensor | Sequence[torch.Tensor]) -> list[Callable[[], object]]:
        """The same in parts."""
        return self._device.linear_tiles(x.reshape(-1, self._in_features), self._layers, _flat(out))


def _flat(out: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [one.view(-1, one.shape[-1]) for one in ([out] if isinstance(out, torch.Tensor) else out)]


def register(worker: Worker, weights: Weights, device: Device) -> None:
    """Register ``embed``, ``linear``, ``batch_linear``, ``matmul``, ``ring_linear``, ``lm_head``, ``attention_block``, ``mlp_block`` and ``full_layer``."""
    layers = Layers(weights.model)
    integers = Integers(device)

    @worker.bound_op(ops.EMBED, out_spec=ops.embed, row_wise=True)
    def embed(*, module: str, width: int, dtype: str, digests: ops.Digests = ops.NO_DIGESTS) -> Callable[..., None]:
        table = weights.embedding(module, width, dtype)
        weights.check(module, digests)

        def run(ids: torch.Tensor, *, out: torch.Tensor) -> None:
            device.rows(table, ids.reshape(-1), out.view(-1, width))

        return device.staged(run)

    def linear(*, module: str, in_features: int, out_features: int, digests: ops.Digests = ops.NO_DIGESTS) -> Callable[..., None]:
        layers = [weights.linear(module, in_features, out_features)]
        weights.check(module, digests)
        return device.staged(Linear(device, layers, in_features))

    worker.bound_op(ops.LINEAR, out_spec=ops.linear, row_wise=True)(linear)
    worker.bound_op(ops.LM_HEAD, out_spec=ops.linear, row_wise=True)(linear)

    @worker.bound_op(ops.BATCH_LINEAR, out_spec=ops.batch_linear, row_wise=True)
    def batch_linear(
        *, modules: Sequence[str], in_features: int, out_features: Sequence[int], digests: Sequence[ops.Digests] = ()
    ) -> Callable[..., None]:
        layers = [weights.linear(module, in_features, width) for module, width in zip(modules, out_features, strict=True)]
        for module, told in zip(modules, digests, strict=False):
            weights.check(module, told)
        return device.staged(Linear(device, layers, in_features))

    @worker.bound_op(ops.RING_LINEAR, out_spec=ops.ring_linear, row_wise=True)
    def ring_linear(
        *, modules: Sequence[str], in_features: int, out_features: Sequence[int], bits: int, digests: Sequence[ops.Digests] = ()
    ) -> Callable[..., None]:
        held = [weights.linear(module, in_features, width)[0] for module, width in zip(modules, out_features, strict=True)]
        for module, told in zip(modules, digests, strict=False):
            weights.check(module, told)
        product = integers.product(tuple(modules), held, bits)
        total = sum(out_features)

        def run(x: torch.Tensor, *, out: torch.Tensor) -> None:
            product(x.reshape(-1, in_features).contiguous(), out.view(-1, total))

        return device.staged(run)

    def matmul(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        device.matmul(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), out.view(-1, *out.shape[-2:]))

    worker.op(ops.MATMUL, out_spec=ops.matmul)(device.staged(matmul))

    @worker.bound_op(ops.FULL_LAYER, out_spec=ops.full_layer)
    def full_layer(*, layer: int, channel_state: dict[str, Any], digests: ops.Digests = ops.NO_DIGESTS) -> Callable[..., None]:
        weights.check(layers.name_of(layer), digests)
        return device.staged(layers.full_layer(layer, channel_state), READ_ON_HOST)

    @worker.bound_op(ops.ATTENTION_BLOCK, out_spec=ops.attention_block)
    def attention_block(*, layer: int, channel_state: dict[str, Any], digests: ops.Digests = ops.NO_DIGESTS) -> Callable[..., None]:
        weights.check(layers.name_of(layer, "attention"), digests)
        return device.staged(layers.attention_block(layer, channel_state), READ_ON_HOST)

    @worker.bound_op(ops.MLP_BLOCK, out_spec=ops.mlp_block)
    def mlp_block(*, layer: int, digests: ops.Digests = ops.NO_DIGESTS) -> Callable[..., None]:
        weights.check(layers.name_of(layer, "feed_forward"), digests)
        return device.staged(layers.mlp_block(layer))
