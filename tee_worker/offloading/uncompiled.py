"""What ``torch.compile`` leaves as it is: calls to the GPU worker, at which a compiled graph ends and the next one begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """``function``, which is never compiled."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
