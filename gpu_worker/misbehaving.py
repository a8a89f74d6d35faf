"""A GPU worker that is not to be trusted, for demonstrations and tests: it reads what it can, and lies when it is told to."""

from __future__ import annotations

import ctypes
import enum
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpu_worker.device import CpuDevice, RingProduct
from shmbroker.models import decoder_layers
from shmbroker.trust.quantization import IntegerWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lie(str, enum.Enum):
    """What is done to one result."""

    CHANGE = "change"
    """One number of it is another."""
    SWAP = "swap"
    """Two rows are in each other's place; of one row, two numbers."""
    STALE = "stale"
    """It is the last one of the same size."""
    OTHER = "other"
    """It is as of another weight."""
    REWRITE = "rewrite"
    """It is written over, again and again, from when it was given on."""


_REWRITES = 200
_REWRITE_SECONDS = 0.0002


class MisbehavingDevice(CpuDevice):
    """Computes on the CPU. ``read``: a file for what it can tell of the prompt; ``lie``: what it does to its result number ``lie_at``."""

    def __init__(self, read: Path | None, lie: Lie | None, lie_at: int) -> None:
        self._read = read
        self._lie = lie
        self._lie_at = lie_at
        self._results = 0
        self._last: dict[torch.Size, torch.Tensor] = {}
        self._model: PreTrainedModel | None = None
        self._dictionary: torch.Tensor | None = None
        self._lock = threading.Lock()

    def take(self, model: PreTrainedModel) -> None:
        """And remember it: it is public."""
        self._model = model

    def rows(self, table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Which tells the tokens themselves."""
        super().rows(table, ids, out)
        if self._read is not None and ids.numel() > 1:
            self._note("embed", ids.tolist())

    def linear(self, x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], outs: Sequence[torch.Tensor]) -> None:
        """As it should, but for the lie."""
        super().linear(x, layers, outs)
        self._looked_at(x, outs[0])

    def linear_tiles(
        self, x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], outs: Sequence[torch.Tensor]
    ) -> list[Callable[[], object]]:
        """None: results are counted by calls."""
        return []

    def ring_product(self, weight: IntegerWeight) -> RingProduct:
        """As it should, but for the lie."""
        honest: Callable[[torch.Tensor, torch.Tensor], None] = super().ring_product(weight)

        def run(x: torch.Tensor, out: torch.Tensor) -> None:
            honest(x, out)
            self._looked_at(x, out)

        return run

    def _looked_at(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._read is not None and len(x) > 1:
            dictionary = self._first_rows()
            if x.shape[1] == dictionary.shape[1]:
                self._note("rows", nearest(x, dictionary))
        with self._lock:
            self._results += 1
            if self._lie is not None and self._results == self._lie_at:
                self._tamper(self._lie, out)
            if self._lie is Lie.STALE:
                self._last[out.shape] = out.clone()

    def _tamper(self, lie: Lie, out: torch.Tensor) -> None:
        if lie is Lie.CHANGE:
            out[-1, out.shape[1] // 2] += 1
        elif lie is Lie.SWAP:
            swapped = out[[1, 0, *range(2, len(out))]] if len(out) > 1 else out[:, [1, 0, *range(2, out.shape[1])]]
            out.copy_(swapped)
        elif lie is Lie.STALE:
            out.copy_(self._last.get(out.shape, torch.zeros_like(out)))
        elif lie is Lie.OTHER:
            out.copy_(out.flip(1))
        else:
            address, nbytes = out.data_ptr(), out.numel() * out.itemsize
            threading.Thread(target=_write_over, args=(address, nbytes), name="rewrite", daemon=True).start()

    def _first_rows(self) -> torch.Tensor:
        """What each token looks like where the first layer reads it: its embedding, normalized as the model does."""
        if self._dictionary is None:
            assert self._model is not None
            table = self._model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
            _, layer = decoder_layers(self._model)[0]
            norm = next((one for name, one in layer.named_children() if "norm" in name.lower()), None)
            with torch.no_grad():
                self._dictionary = table if norm is None else norm(table.to(self._model.dtype)).float()
        return self._dictionary

    def _note(self, what: str, tokens: Sequence[int]) -> None:
        assert self._read is not None
        with self._lock, self._read.open("a") as file:
            file.write(json.dumps({"from": what, "tokens": list(tokens)}) + "\n")


def nearest(rows: torch.Tensor, dictionary: torch.Tensor) -> list[int]:
    """Of each row, ``[n, width]``, the entry of the dictionary, ``[tokens, width]``, that points the same way."""
    wide = torch.nn.functional.normalize(rows.float(), dim=1)
    found: list[int] = (wide @ torch.nn.functional.normalize(dictionary, dim=1).t()).argmax(dim=1).tolist()
    return found


def _write_over(address: int, nbytes: int) -> None:
    for turn in range(_REWRITES):
        ctypes.memset(address, turn & 0xFF, nbytes)
        time.sleep(_REWRITE_SECONDS)
