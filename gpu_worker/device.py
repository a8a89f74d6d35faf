"""Devices that a GPU worker computes on: what ops need of one, and the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gpu_worker.few_rows import FewRows
from shmbroker.memory.layout import round_up
from shmbroker.models.threads import SingleThreaded, compute_threads
from shmbroker.trust.loops import product
from shmbroker.trust.quantization import IntegerWeight
from shmbroker.worker import DeviceMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RingProduct = Callable[[torch.Tensor, torch.Tensor], None]
"""Given x ``[n, in]`` and out ``[n, out]``, int32."""


class Device(Protocol):
    """What ops need of a device. Every ``out`` lies in the client's segment and is written there."""

    name: str
    memory: DeviceMemory | None
    """What its worker must ask of it; None where it computes in the clients' memory."""

    def take(self, model: PreTrainedModel) -> None:
        """Bring a model's modules to where the device computes."""

    def staged(self, function: Callable[..., Any], on_host: Collection[int] = ()) -> Callable[..., Any]:
        """``function(*inputs, out=..., **arguments)`` with its tensors brought to where the device computes, but for the inputs ``on_host``."""

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight, kept where the device computes."""

    def rows(self, table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        """``out[i] = table[ids[i]]``: ids ``[n]`` int64, table ``[rows, width]``, out ``[n, width]``."""

    def linear(self, x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], outs: Sequence[torch.Tensor]) -> None:
        """``out = x @ weight + bias`` for each layer: x ``[n, in]``, weight ``[in, out]`` (transposed view), out ``[n, out]``."""

    def linear_tiles(
        self, x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], outs: Sequence[torch.Tensor]
    ) -> list[Callable[[], object]]:
        """:meth:`linear` in parts, to be run one after the other; none where it is not to be divided."""

    def matmul(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """``out = a @ b``: ``[n, m, k]``, ``[n, k, l]``, ``[n, m, l]``."""

    def ring_product(self, weight: IntegerWeight) -> RingProduct:
        """What multiplies with a weight ``[out, in]`` of integers, modulo 2^32."""


_OUTPUTS_AT_ONCE = 4
"""Of the compiled product."""

_WORTH_SHARING = 1 << 19
"""Products of numbers: some 30 us on one core, a few times what waking another thread costs."""


_TILE_PRODUCTS = 220_000_000
"""Of two numbers, in a tile: some 5 ms on one core."""

_TILE_ROWS = 256
"""With them, tiles of a product of 1024 rows and 1024 x 5632 take in all what the whole takes; with 64 rows and all columns it is 1.6 times as long."""

_SLOW_TILE_ROWS = 64
"""Of 16-bit numbers, which many processors multiply far slower."""

_LEAST_TILE_COLUMNS = 128
"""A product with one column is another routine's, whose bits depend on how many rows it has; one with so few takes no time anyway."""


def _cut(length: int, most: int) -> list[tuple[int, int]]:
    """``[0, length)`` in parts of about ``most``, at multiples of 16: no part so small that another routine would compute it."""
    parts = max(1, round(length / most))
    ends = [round_up(length * part // parts, 16) for part in range(1, parts)]
    return list(zip([0, *ends], [*ends, length], strict=True))


class CpuDevice:
    """Computes on the CPU, straight from the client's blocks into the client's blocks."""

    name = "cpu"
    memory: DeviceMemory | None = None

    def take(self, model: PreTrainedModel) -> None:
        """It is there."""

    def staged(self, function: Callable[..., Any], on_host: Collection[int] = ()) -> Callable[..., Any]:
        """The function as it is."""
        return function

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight as it is."""
        return tensor

    def rows(self, table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Select rows."""
        torch.index_select(table, 0, ids, out=out)

    def linear(self, x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], outs: Sequence[torch.Tensor]) -> None:
        """One matrix product a layer."""
        for (weight, bias), out in zip(layers, outs, strict=True):
            self._few_rows.linear(x, weight, bias, out)

    def linear_tiles(
        self, x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], outs: Sequence[torch.Tensor]
    ) -> list[Callable[[], object]]:
        """Some rows times some columns each: a weight that is cut by columns too is not read anew for each piece."""
        return [
            functools.partial(
                self.linear,
                x[first:end],
                [(weight[:, left:right], None if bias is None else bias[left:right])],
                [out[first:end, left:right]],
            )
            for (weight, bias), out in zip(layers, outs, strict=True)
            for first, end in (
                [(0, len(x))]
                if weight.shape[1] < _LEAST_TILE_COLUMNS
                else _cut(len(x), _TILE_ROWS if x.dtype is torch.float32 else _SLOW_TILE_ROWS)
            )
            for left, right in _cut(weight.shape[1], max(_LEAST_TILE_COLUMNS, _TILE_PRODUCTS // (_TILE_ROWS * weight.shape[0])))
        ]

    def matmul(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """A batch of matrix products. Small ones, as those of a decode's attention, by this thread alone, which takes a tenth of the time."""
        if a.device.type != "cpu" or a.numel() * b.shape[-1] >= _WORTH_SHARING:
            torch.bmm(a, b, out=out)
            return
        with SingleThreaded():  # the library below shares work of any size
            torch.bmm(a, b, out=out)

    def ring_product(self, weight: IntegerWeight) -> RingProduct:
        """By as many threads as torch computes with."""
        threads = compute_threads()
        if threads == 1:
            return lambda x, out: product(x, weight.integers, out)
        share = round_up(-(-weight.integers.shape[0] // threads), _OUTPUTS_AT_ONCE)
        parts = [(first, weight.integers[first : first + share]) for first in range(0, weight.integers.shape[0], share)]

        def run(x: torch.Tensor, out: torch.Tensor) -> None:
            if x.numel() * weight.integers.shape[0] < _WORTH_SHARING:
                product(x, weight.integers, out)
                return
            running = [self._pool.submit(_share_of_product, [x, part, out[:, first : first + len(part)]]) for first, part in parts[1:]]
            product(x, parts[0][1], out[:, : len(parts[0][1])])
            for one in running:
                one.result()

        return run

    @functools.cached_property
    def _few_rows(self) -> FewRows:
        return FewRows()

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(compute_threads() - 1, thread_name_prefix="ring-product")


def _share_of_product(given: list[torch.Tensor]) -> None:
    """Emptied: the pool lets go of its arguments only after the result is there, and a call's tensors end with the call."""
    x, weight, out = given
    given.clear()
    product(x, weight, out)
