"""The weights that a GPU worker holds as integers, for the trust modes: made at the first bind that asks for them, and kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from gpu_worker.device import Device, RingProduct
from shmbroker.trust.quantization import joined, quantize_weight


class Integers:
    """Products by the modules' names and the bits."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._products: dict[tuple[tuple[str, ...], int], RingProduct] = {}
        self._lock = threading.Lock()

    def product(self, modules: tuple[str, ...], weights: Sequence[torch.Tensor], bits: int) -> RingProduct:
        """Of the weights ``[in, out]`` of ``modules``, side by side. Raises :class:`BadInput` for bits that there are not."""
        with self._lock:
            found = self._products.get((modules, bits))
            if found is None:
                weight = joined([quantize_weight(one.t(), bits) for one in weights])
                found = self._products[modules, bits] = self._device.ring_product(weight)
            return found
