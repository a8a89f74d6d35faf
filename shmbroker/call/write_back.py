"""Inputs of an op that works in place, where they do not lie in the arena: what the op wrote into their copies is copied back to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from shmbroker.errors import BadInput

Back = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""A caller's tensor and its copy in the arena, of each input that was copied."""


def back_to(op: str, inputs: Sequence[Any], placed: Sequence[Any]) -> Back:
    """What is to be copied back of a call of ``op`` with ``inputs``, of which ``placed`` went into the frame.

    Raises :class:`BadInput` for an input that cannot be written to, and for two that share memory: of their copies, which would be right?
    """
    back: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, (outside, inside) in enumerate(zip(inputs, placed, strict=True)):
        if outside is inside:
            continue
        what = f"op {op!r} works in place, and input {index}"
        if not isinstance(outside, torch.Tensor):
            raise BadInput(f"{what} is a {type(outside).__name__}: give a torch tensor (torch.from_numpy shares an array's memory)")
        if torch._debug_has_internal_overlap(outside) == 1:
            raise BadInput(f"{what} has elements that share memory (expand() makes such): give a contiguous() one")
        if any(_overlap(outside, other) for other, _ in back):
            raise BadInput(f"{what} shares memory with another input: place them in the arena (client.copy_in), or give different ones")
        back.append((outside, inside))
    return back


def copy_back(back: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give the callers what was written. In whatever thread has taken the completion."""
    with torch.inference_mode():  # so that tensors that were made in it, and parameters, can be written to
        for outside, inside in back:
            outside.copy_(inside)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    first, second = sorted([_reach(one), _reach(other)])
    return second[0] < first[1] and one.device == other.device


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """From the first byte to behind the last."""
    elements = tensor.nbytes and 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
