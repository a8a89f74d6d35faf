"""The compiled loops, in nanoseconds for each number, and what a weight costs when it is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.table import Table
from shmbroker.trust import loops as measured
from shmbroker.trust.check import make_secret
from shmbroker.trust.pads import fill_random
from shmbroker.trust.quantization import quantize_weight

COLUMNS, OUTPUTS = 1536, 3072
STREAM_BYTES = 1 << 24
PARAMETERS = 135_000_000
"""Of the embedded model."""


def loops(rows: int, rounds: int) -> dict[str, Any]:
    """Print the table; the figures: the best of so many rounds."""
    torch.manual_seed(0)
    x = torch.randn(rows, COLUMNS)
    weights = torch.randn(OUTPUTS, COLUMNS)
    weight = quantize_weight(weights, 12)
    secret = make_secret(weight.integers)
    limit = weight.limit()
    pads, out = torch.zeros(rows, COLUMNS, dtype=torch.int32), torch.empty(rows, COLUMNS, dtype=torch.int32)
    sums, scales = torch.empty(rows, 2, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
    products, row = torch.empty(rows, OUTPUTS, dtype=torch.int32), torch.empty(OUTPUTS, dtype=torch.int32)
    taken_off, result = torch.zeros(rows, OUTPUTS, dtype=torch.int32), torch.empty(rows, OUTPUTS)
    stream = torch.empty(STREAM_BYTES, dtype=torch.uint8)
    wide, transposed = x.clone(), weights.t().contiguous()
    inputs, outputs, work = rows * COLUMNS, rows * OUTPUTS, rows * COLUMNS * OUTPUTS
    cases: dict[str, tuple[Callable[[], object], int, str]] = {
        "quantize, first sum": (lambda: measured.seal(x, limit, None, out, secret.inputs, sums, scales), inputs, "ns an input"),
        "and mask": (lambda: measured.seal(x, limit, pads, out, secret.inputs, sums, scales), inputs, "ns an input"),
        "integer product": (lambda: measured.product(out, weight.integers, products), work, "ns a product"),
        "float32 product, torch": (lambda: torch.mm(wide, transposed), work, "ns a product"),
        "copy, second sum, dequantize": (
            lambda: measured.open_rows(products, row, None, secret.outputs, sums, scales, weight.scales, None, result), outputs, "ns an output",
        ),
        "and unmask": (
            lambda: measured.open_rows(products, row, taken_off, secret.outputs, sums, scales, weight.scales, None, result), outputs, "ns an output",
        ),
        "ChaCha20": (lambda: fill_random(stream), STREAM_BYTES, "ns a byte"),
        "quantize a weight": (lambda: quantize_weight(weights, 12), COLUMNS * OUTPUTS, "ns a weight"),
        "the secret S of a weight": (lambda: make_secret(weight.integers), COLUMNS * OUTPUTS, "ns a weight"),
    }  # fmt: skip
    table = Table(f"loops ({measured.kind()}), {rows} rows of {COLUMNS} to {OUTPUTS}, one thread", ["", "ns", "of"])
    figures: dict[str, Any] = {"kind": measured.kind()}
    for name, (run, count, unit) in cases.items():
        figures[name] = _best(run, rounds) / count
        table.row(name, f"{figures[name]:.4f}" if figures[name] < 0.1 else f"{figures[name]:.2f}", unit)
    table.show()
    print(f"S of {PARAMETERS / 1e6:.0f} million weights: {figures['the secret S of a weight'] * PARAMETERS / 1e9:.2f} s\n")
    return figures


def _best(run: Callable[[], object], rounds: int) -> float:
    """Nanoseconds."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - begun)
    return min(times)
