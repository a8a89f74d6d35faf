"""The tensors that a worker keeps for a channel: results that stay for its later calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.errors import BadInput

MOST_KEPT = 1 << 16
"""On one channel: empty ones cost memory too."""

DEFAULT_KEPT_BYTES = 4 << 30
"""On one channel: as much as the keys and values of a long conversation, and a bound for a client that never lets go."""


class KeptTensors:
    """A channel's kept tensors by number. ``limit``: bytes that they may have together. Used by one thread at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tensors: dict[int, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in list(self._tensors.values()))

    def __len__(self) -> int:
        return len(self._tensors)

    def find(self, number: int, spec: TensorSpec) -> torch.Tensor:
        """The tensor ``number``. Raises :class:`BadInput` when there is none, or one of another form."""
        tensor = self._tensors.get(number)
        if tensor is None:
            raise BadInput(f"no kept tensor {number} is on this channel: it was freed, or never kept")
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            raise BadInput(f"kept tensor {number} is {TensorSpec(tensor.shape, tensor.dtype)}, not {spec}")
        # .data: a version counter of its own for each call, as all inputs have.
        return tensor.data

    def check_new(self, wanted: Iterator[tuple[int, TensorSpec]]) -> None:
        """Raise :class:`BadInput` unless all these may be kept beside what is."""
        numbers: set[int] = set()
        nbytes = self.nbytes
        for number, spec in wanted:
            if number in self._tensors or number in numbers:
                raise BadInput(f"kept tensor {number} is on this channel already")
            numbers.add(number)
            nbytes += max(spec.nbytes, 1)
        if nbytes > self._limit:
            raise BadInput(f"{nbytes} bytes of kept tensors on one channel; this worker keeps at most {self._limit}: free some first")
        if len(self._tensors) + len(numbers) > MOST_KEPT:
            raise BadInput(f"more than {MOST_KEPT} kept tensors on one channel: free some first")

    def add(self, tensors: dict[int, torch.Tensor]) -> None:
        """Keep these, which :meth:`check_new` allowed."""
        self._tensors.update(tensors)

    def let_go(self, number: int) -> None:
        """Forget ``number``, if it is there: a call that failed has kept nothing, and its client does not know."""
        self._tensors.pop(number, None)

    def clear(self) -> None:
        """Forget all."""
        self._tensors.clear()
