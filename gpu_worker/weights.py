"""The weights that a GPU worker holds: of linear layers and embeddings, by the modules' names in the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gpu_worker.device import Device
from shmbroker.errors import BadInput
from shmbroker.models import ModelSource, digests_of, is_linear, weight_and_bias

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 4096
"""Elements of a tensor that go into the digest: any other training of the same model differs in nearly all of them."""


@dataclass(slots=True)
class Weights:
    """Weights by module name. ``linear``: transposed weight ``[in, out]`` and bias; ``embedding``: ``[rows, width]``."""

    dtype: torch.dtype
    model: PreTrainedModel
    """Whose modules the weights are of."""
    linears: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    _digests: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of modules that a client has asked for."""

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype, device: Device) -> Weights:
        """Take everything from ``source``: whole layers need the small parameters too."""
        model = source.model(dtype)
        device.take(model)
        weights = cls(dtype, model)
        held: dict[int, torch.Tensor] = {}

        def hold(parameter: torch.Tensor) -> torch.Tensor:
            # Tied weights are one tensor, and stay one.
            return held.setdefault(id(parameter), device.hold(parameter.detach()))

        for name, module in model.named_modules():
            if is_linear(module):
                weight, bias, transposed = weight_and_bias(module)
                weights.linears[name] = (hold(weight) if transposed else hold(weight).t(), None if bias is None else hold(bias))
            elif module is model.get_input_embeddings():
                weights.embeddings[name] = hold(module.weight)  # type: ignore[arg-type]
        return weights

    def check(self, module: str, told: Mapping[str, str]) -> None:
        """Raise :class:`BadInput` unless all parameters of ``module`` are those whose digests a client has told, if it has told any."""
        if not told:
            return
        held = self._digests.get(module)
        if held is None:
            held = self._digests[module] = digests_of(self.model.get_submodule(module))
        if held == told:
            return
        missing, more = sorted(told.keys() - held.keys()), sorted(held.keys() - told.keys())
        if missing or more:
            raise BadInput(
                f"{module} has other parameters here than at the client: {', '.join(missing) or 'nothing'} only there, {', '.join(more) or 'nothing'} "
                "only here; an adapter stays in the TEE at splits 'linear', 'fused' and 'op', or is merged into what both load"
            )
        other = next(name for name in sorted(held) if held[name] != told[name])
        raise BadInput(
            f"{module}.{other} has other values here than at the client (fine-tuned, merged, or of another revision): start both with the same weights"
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, tied weights counted once."""
        tensors = [*self.embeddings.values(), *(part for layer in self.linears.values() for part in layer if part is not None)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def identity(self) -> str:
        """The same for the same weights in the same dtype: a digest of all names, shapes and a sample of each tensor's bytes."""
        digest = hashlib.sha256(str(self.dtype).encode())
        named = {**self.embeddings, **{name: layer[0] for name, layer in self.linears.items()}}
        named.update({f"{name}.bias": layer[1] for name, layer in self.linears.items() if layer[1] is not None})
        for name, tensor in sorted(named.items()):
            flat = tensor.t().reshape(-1) if tensor.ndim == 2 and not tensor.is_contiguous() else tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
            digest.update(f"{name} {list(tensor.shape)} ".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return f"weights {digest.hexdigest()[:16]}"

    def linear(self, module: str, in_features: int, out_features: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear layer ``module``. Raises :class:`BadInput` unless it is there with these sizes."""
        layer = self.linears.get(module)
        if layer is None:
            raise BadInput(f"this worker's model has no linear layer {module!r}: are both workers started with the same --model?")
        if tuple(layer[0].shape) != (in_features, out_features):
            raise BadInput(
                f"linear layer {module!r} is {layer[0].shape[0]} x {layer[0].shape[1]} here, {in_features} x {out_features} at the client: "
                "start both workers with the same --model"
            )
        return layer

    def embedding(self, module: str, width: int, dtype: str) -> torch.Tensor:
        """The embedding ``module``. Raises :class:`BadInput` unless it is there with this width and dtype."""
        table = self.embeddings.get(module)
        if table is None:
            raise BadInput(f"this worker's model has no embedding {module!r}: are both workers started with the same --model?")
        here = str(table.dtype).removeprefix("torch.")
        if table.shape[1] != width or here != dtype:
            raise BadInput(
                f"embedding {module!r} is {here} of width {table.shape[1]} here, {dtype} of width {width} at the client: start both workers "
                "with the same --model and --dtype"
            )
        return table
