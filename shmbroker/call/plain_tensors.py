"""Inputs that are more than their bytes: derivatives, transformations and wrappers end at a call, so they are refused rather than lost in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from shmbroker.errors import BadInput

levels = forward_ad
"""``levels._current_level`` is 0 or more while forward-mode derivatives are taken: every call looks at it, so that it is one look-up."""

is_transformed: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def refuse_gradient(what: str, tensor: torch.Tensor) -> None:
    """Raise :class:`BadInput` when a derivative of ``tensor`` is being taken, backwards or forwards. ``what`` names it."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise BadInput(
            f"{what} requires grad, and no gradient comes back through a call: call under torch.no_grad(), or hand over its detach() where its "
            "gradient is not needed"
        )
    if levels._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise BadInput(
            f"{what} has a tangent, and none goes through a call: hand over forward_ad.unpack_dual(x).primal where its derivative is not needed"
        )


def refuse_tangents(what: str, tensors: Iterable[Any]) -> None:
    """:func:`refuse_gradient` of whatever is a tensor, while forward-mode derivatives are taken."""
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, torch.Tensor):
            refuse_gradient(f"{what} {index}", tensor)


def refuse_wrapped(what: str, tensor: torch.Tensor) -> None:
    """Raise :class:`BadInput` for a tensor that has no bytes, or whose bytes alone are not its values."""
    if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise BadInput(f"{what}: a {kind} tensor on {tensor.device} has no bytes to hand over")
    if is_transformed(tensor):
        raise BadInput(f"{what} is being transformed (torch.func, vmap), and a call is not: call outside of the transformation")
    storage, reach = (
        tensor.untyped_storage(),
        1 + sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]),
    )
    if tensor.numel() and storage.nbytes() < (int(tensor.storage_offset()) + reach) * tensor.itemsize:
        raise BadInput(f"{what} reaches beyond its storage of {storage.nbytes()} bytes, which was resized: hand over what has its values")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # quantized, masked, distributed, fake
        raise BadInput(
            f"{what} is a {type(tensor).__name__}, whose bytes alone are not its values: hand over a plain tensor (its dequantize(), "
            "to_local() or to_tensor(), say)"
        )
