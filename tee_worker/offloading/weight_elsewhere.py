"""A weight that is on the GPU worker, as who looks at the model here sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shmbroker.errors import BadInput


class WeightElsewhere(torch.Tensor):
    """Tells shape, dtype and device, and refuses to be computed with, copied or saved. It has no memory."""

    parameter_name: str
    rows: Callable[[torch.Tensor], torch.Tensor] | None
    """Of an embedding: asks the worker for the rows of ids ``[1, ids]``."""

    @staticmethod
    def __new__(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> WeightElsewhere:
        """``name``: the parameter's, for refusals. ``rows``: as the attribute."""
        made: WeightElsewhere = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.parameter_name = name
        made.rows = rows
        return made

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"<WeightElsewhere {self.parameter_name!r}: {str(self.dtype).removeprefix('torch.')} {list(self.shape)}, on the GPU worker>"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = next(one for one in _flat([*args, *(kwargs or {}).values()]) if isinstance(one, WeightElsewhere))
        if function is torch.ops.aten.detach.default:
            return found
        raise found.refusal(str(function))

    def refusal(self, what: str) -> BadInput:
        """The error for who would do something with the weight."""
        return BadInput(
            f"{self.parameter_name} is on the GPU worker, and only its shape, dtype and device are here ({what}): use the model as it was before offload()"
        )

    def __deepcopy__(self, memo: object) -> Any:
        raise self.refusal("copy.deepcopy")

    def __reduce_ex__(self, protocol: object) -> Any:
        raise self.refusal("pickle")

    def __getitem__(self, index: Any) -> Any:
        """One row of an embedding, which the worker is asked for; all else is refused."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if self.rows is not None and isinstance(first, int) and all(one in (slice(None), ...) for one in rest):
            return self.rows(torch.tensor([[first % self.shape[0]]]))[0, 0]
        raise self.refusal("[...]")

    def data_ptr(self) -> int:
        """Refused: it has no memory."""
        raise self.refusal("data_ptr")


def _flat(values: list[Any]) -> list[Any]:
    return [inner for value in values for inner in (_flat(list(value)) if isinstance(value, list | tuple) else [value])]
