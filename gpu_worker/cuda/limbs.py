"""Products modulo 2^32 on a GPU: 32-bit rows and weights of up to 14 bits in limbs of 8 bits, whose products the tensor cores sum in 32 bits.

With signed limbs x = sum of x_i 2^(8 i), i in 0 to 3, and w = w_0 + w_1 2^8; what is 2^32 or more counts for nothing: 4 products for weights of 8 bits,
7 beyond. Sums of 32 bits that wrap are the same modulo 2^32.
"""

from __future__ import annotations

import torch

from shmbroker.memory.layout import round_up
from shmbroker.trust.quantization import IntegerWeight

LIMB_BITS = 8
_ROW_LIMBS = 4

_SIZES = 8
"""What ``torch._int_mm`` has the sizes be multiples of, on CUDA."""

_FEWEST_ROWS = 17
"""What it takes, on CUDA."""


def limbs_of(integers: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Signed limbs, int8, the lowest first; together the integers modulo 2^(8 count)."""
    rest = integers.to(torch.int64)
    found = []
    for _ in range(count):
        low = ((rest + 128) & 0xFF) - 128
        found.append(low.to(torch.int8))
        rest = (rest - low) >> LIMB_BITS
    return found


class LimbProduct:
    """Multiplies with one weight."""

    def __init__(self, weight: IntegerWeight, device: torch.device) -> None:
        outputs, columns = weight.integers.shape
        self._sizes = round_up(columns, _SIZES), round_up(outputs, _SIZES)
        self._limbs: list[torch.Tensor] = []
        for limb in limbs_of(weight.integers, 1 if weight.bits <= LIMB_BITS else 2):
            padded = torch.zeros((self._sizes[1], self._sizes[0]), dtype=torch.int8)
            padded[:outputs, :columns] = limb
            self._limbs.append(padded.to(device).t())

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """X ``[n, in]`` and out ``[n, out]``, int32."""
        rows, columns = x.shape
        padded = torch.zeros((max(rows, _FEWEST_ROWS), self._sizes[0]), dtype=torch.int32, device=x.device)
        padded[:rows, :columns] = x
        total: torch.Tensor | None = None
        for power, row_limb in reversed(list(enumerate(limbs_of(padded, _ROW_LIMBS)))):
            for more, weight_limb in enumerate(self._limbs):
                if power + more < _ROW_LIMBS:
                    part = torch._int_mm(row_limb, weight_limb) << (LIMB_BITS * (power + more))
                    total = part if total is None else total.add_(part)
        assert total is not None
        out.copy_(total[:rows, : out.shape[1]])
