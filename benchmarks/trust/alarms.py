"""False alarms: right results that a check rejects. There must be none."""

from __future__ import annotations

from typing import Any

import torch

from shmbroker.trust import loops
from shmbroker.trust.check import make_secret
from shmbroker.trust.quantization import quantize_weight
from tee_worker.trust.float_check import tolerance_of, vectors_of

COLUMNS, OUTPUTS = 96, 64
ROWS_AT_ONCE = 50_000


def alarms(rows: int) -> dict[str, Any]:
    """Count them over so many rows of each arithmetic, with new secrets every some thousand rows."""
    torch.manual_seed(0)
    found = {"exact": 0, "float": 0}
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        weights = torch.randn(OUTPUTS, COLUMNS) * torch.rand(OUTPUTS, 1) * 10
        x = torch.randn(count, COLUMNS) * torch.rand(count, 1) * 100
        x[::7, 3] *= 1e3  # outliers, as models have them
        found["exact"] += _exact(x, weights)
        found["float"] += _float(x, weights)
    print(f"{rows} right rows of each arithmetic: {found['exact']} false alarms exact, {found['float']} float")
    return {"rows": rows, **{f"none_{arithmetic}": not count for arithmetic, count in found.items()}}


def _exact(x: torch.Tensor, weights: torch.Tensor) -> int:
    """1 where a row is rejected."""
    weight = quantize_weight(weights, 12)
    secret = make_secret(weight.integers)
    out, products = torch.empty(x.shape, dtype=torch.int32), torch.empty(len(x), OUTPUTS, dtype=torch.int32)
    sums, scales = torch.empty(len(x), 2, dtype=torch.int64), torch.empty(len(x), dtype=torch.float64)
    loops.seal(x, weight.limit(), None, out, secret.inputs, sums, scales)
    loops.product(out, weight.integers, products)
    row = torch.empty(OUTPUTS, dtype=torch.int32)
    return int(loops.open_rows(products, row, None, secret.outputs, sums, scales, weight.scales, None, torch.empty(len(x), OUTPUTS)) >= 0)


def _float(x: torch.Tensor, weights: torch.Tensor) -> int:
    outputs, inputs = vectors_of([weights])
    y = x @ weights.t()
    product = loops.FloatProduct(y, torch.empty_like(y), outputs[0], None)
    return int(loops.residues(x, inputs, [product], tolerance_of([weights]), torch.empty(len(x), dtype=torch.float64)) >= 0)
