"""``verify`` with arithmetic ``float``: plain's own products, checked approximately.

With R Gaussian, S = W^T R: of a row x with the output y, x S - y R is the rounding of y, and so within t c u ||x|| ||W||_F in each of 8 vectors (Freivalds'
check; c for sums of some thousand products, t for the tail). A deviation of some 32 times that is found but for one in 10^5 rows; what is below passes. So
it is called approximate wherever it is named, and at the head, where a small deviation chooses another token, candidates are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shmbroker.client import Bindable
from shmbroker.errors import BadInput
from shmbroker.models import ops
from shmbroker.trust.loops import FloatProduct, residues
from shmbroker.trust.pads import fill_random
from tee_worker.trust.session import TrustSession

VECTORS = 8
TAIL = 8.0
"""t."""

SUMS = 4.2
"""c."""

ROUNDING = 2.0**-24
"""u, of float32."""

WINDOW = 32.0
"""Tolerances that a deviation may have which is not found."""

_NOT_FINITE = -2


def vectors_of(weights: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """R for each weight ``[out, in]``, and S: float32 ``[out, VECTORS]`` each, and float64 ``[in, VECTORS]``."""
    outputs = [_gaussian(len(weight)) for weight in weights]
    inputs = torch.zeros(weights[0].shape[1], VECTORS, dtype=torch.float64)
    for weight, vectors in zip(weights, outputs, strict=True):
        inputs += weight.detach().double().t() @ vectors.double()
    return outputs, inputs


def _gaussian(rows: int) -> torch.Tensor:
    """float32 ``[rows, VECTORS]``, by Box and Muller from uniform words: a generator of 32 bits of seed could be guessed."""
    words = torch.empty((2, rows, VECTORS), dtype=torch.int32)
    fill_random(words)
    radius, angle = (words.to(torch.float64) + (2**31 + 0.5)) / 2**32
    found: torch.Tensor = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    return found.to(torch.float32)


def tolerance_of(weights: Sequence[torch.Tensor]) -> float:
    """What a residue may be for a row of norm 1."""
    norm = sum(float(weight.detach().double().square().sum()) for weight in weights)
    return float(TAIL * SUMS * ROUNDING * norm**0.5)


class FloatLayer:
    """Linear layers with the same input, ``[..., in]`` to one ``[..., out]`` each, float32. Thread-safe."""

    def __init__(
        self,
        channel: Bindable,
        session: TrustSession,
        names: Sequence[str],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        digests: Sequence[Mapping[str, str]],
        *,
        head: bool = False,
    ) -> None:
        """``weights``: ``[out, in]`` each. ``head``: whether a small deviation chooses another token: its weight is kept here."""
        self.names = tuple(names)
        self._session = session
        self._widths = [len(weight) for weight in weights]
        self._biases = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
        columns = weights[0].shape[1]
        if len(names) == 1:
            self._op = channel.bind(
                ops.LM_HEAD if head else ops.LINEAR,
                out_spec=ops.linear,
                module=names[0],
                in_features=columns,
                out_features=self._widths[0],
                digests=dict(digests[0]),
            )
        else:
            self._op = channel.bind(
                ops.BATCH_LINEAR,
                out_spec=ops.batch_linear,
                modules=list(names),
                in_features=columns,
                out_features=self._widths,
                digests=list(digests),
            )
        self._outputs, self._inputs = vectors_of(weights)
        self._tolerance = tolerance_of(weights)
        self._head = weights[0].detach() if head else None

    def __call__(self, x: torch.Tensor) -> Any:
        """The layers' outputs: a tuple, or one tensor where there is one layer. Raises :class:`WrongResult`, and as any call."""
        call = self._session.begin()
        given = self._op(x)
        results = [given] if len(self._widths) == 1 else given
        outputs = [torch.empty(one.shape, dtype=torch.float32) for one in results]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        count = len(rows)
        products = [
            FloatProduct(shared.view(count, width), own.view(count, width), vectors, bias)
            for shared, own, width, vectors, bias in zip(results, outputs, self._widths, self._outputs, self._biases, strict=True)
        ]
        tolerances = torch.empty(count, dtype=torch.float64)
        wrong = residues(rows, self._inputs, products, self._tolerance, tolerances)
        if wrong == _NOT_FINITE:
            raise BadInput(f"{', '.join(self.names)}: activations that are not finite cannot be checked")
        if wrong >= 0:
            raise self._session.reject(self.names, call, wrong)
        self._session.passed(count)
        if self._head is not None:
            self._recompute(rows, products[0].own, tolerances)
        return outputs[0] if len(self._widths) == 1 else tuple(outputs)

    def _recompute(self, x: torch.Tensor, logits: torch.Tensor, tolerances: torch.Tensor) -> None:
        """Of each row, compute here what lies so near to the largest that a deviation which is not found could be between them."""
        assert self._head is not None
        bias = self._biases[0]
        largest = logits.topk(min(2, logits.shape[1]), dim=1).values.tolist()
        for row, tolerance in enumerate(tolerances.tolist()):
            least = largest[row][0] - 2 * WINDOW * tolerance
            if largest[row][-1] < least:
                continue  # no other comes near
            near = logits[row] >= least
            found = self._head[near] @ x[row]
            logits[row][near] = found if bias is None else found + bias[near]


def check_dtype(dtype: torch.dtype) -> None:
    """Raise :class:`BadInput` unless results come back in float32."""
    if dtype is not torch.float32:
        raise BadInput(
            f"arithmetic 'float' needs results in float32, not {dtype}: start both sides with --dtype float32, or use arithmetic 'exact'"
        )
