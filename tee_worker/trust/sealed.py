"""Sealed layers: linear layers whose products a worker computes that is not trusted.

T1  A sealed layer is all that the model is given of the channel. It writes to shared memory integers alone, at ``blind`` and ``shares`` only masked ones,
    each under a pad of its own.
T2  A result is copied once into private memory; what is checked is that copy, and nothing else is used.
T3  A result that is not the product ends the session before anything of it is handed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from shmbroker.call.plain_tensors import refuse_gradient, refuse_wrapped
from shmbroker.client import Bindable, ClientMemory, Op
from shmbroker.errors import BadInput
from shmbroker.models import ops
from shmbroker.trust.check import VECTORS, make_secret
from shmbroker.trust.loops import open_rows, product, seal
from shmbroker.trust.pads import Pad, Pads
from shmbroker.trust.quantization import IntegerWeight
from tee_worker.trust.modes import Trust
from tee_worker.trust.session import TrustSession

_AHEAD_AT_ONCE = 32
"""Pads made in one product ahead of time: the weight is read once for all of them."""


class SealedLayer:
    """Linear layers with the same input, ``[..., in]`` to one ``[..., out]`` each, in the model's dtype. Thread-safe."""

    def __init__(
        self,
        seals: SealedChannel,
        names: Sequence[str],
        weight: IntegerWeight,
        widths: Sequence[int],
        bias: torch.Tensor | None,
        op: Op,
        second: Op | None,
        pads: Pads | None,
    ) -> None:
        """``weight``: of all layers, side by side, as ``widths`` tells; ``bias``: as the weight. ``second``: who is given the pads with each call."""
        self.names = tuple(names)
        self._session = seals.session
        self._memory = seals.memory
        self._second_memory = seals.second_memory
        self._op = op
        self._second = second
        self._widths = list(widths)
        self.limit = weight.limit()
        """The norm that rows are scaled to."""
        self._scales = weight.scales
        self._bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        secret = make_secret(weight.integers)
        self._outputs, self._inputs = secret.outputs, secret.inputs
        self._columns = weight.integers.shape[1]
        self._multiple = self._session.options.hide_lengths
        self._pads = pads

    def __call__(self, x: torch.Tensor) -> Any:
        """The layers' outputs: a tuple, or one tensor where there is one layer. Raises :class:`WrongResult`, :class:`PadsLost`, and as any call."""
        what = ", ".join(self.names)
        refuse_gradient(what, x)
        refuse_wrapped(what, x)
        call = self._session.begin()
        given = x.detach().reshape(-1, self._columns).to(torch.float32)
        count = len(given)
        if count % self._multiple:
            given = torch.cat([given, given.new_zeros(self._multiple - count % self._multiple, self._columns)])
        out = self.run(call, given.contiguous())[:count].to(x.dtype).view(*x.shape[:-1], -1)
        return out if len(self._widths) == 1 else torch.split(out, self._widths, dim=-1)

    def run(self, call: int, x: torch.Tensor) -> torch.Tensor:
        """Float32 ``[rows, in]`` to float32 ``[rows, out]``, checked; ``call``: its number in the session."""
        rows = len(x)
        out = torch.empty((rows, sum(self._widths)), dtype=torch.float32)
        if not rows:
            return out
        sums, scales = torch.empty((rows, VECTORS), dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
        pads = [] if self._pads is None else self._pads.take(rows)
        try:
            share = self._share(pads, rows)
            block = self._sealed(x, pads, sums, scales)
            future = None if share is None or self._second is None else self._second.submit(share)
            result: torch.Tensor = self._op(block)
            del block
            taken_off: list[torch.Tensor | None] = [pad.products for pad in pads]
            if future is not None:
                taken_off = [future.result().clone()]  # copied once: what is taken off is what was checked
            self._open(call, result, taken_off or [None], sums, scales, out)
        finally:
            for pad in pads:
                pad.release()
        self._session.passed(rows)
        return out

    def _sealed(self, x: torch.Tensor, pads: Sequence[Pad], sums: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The rows as the worker is given them, in shared memory; ``sums`` and ``scales`` are filled."""
        block = self._memory.empty(tuple(x.shape), torch.int32)
        masks: list[torch.Tensor | None] = [*(pad.use() for pad in pads)] or [None]
        for part, mask in zip(_parts(masks, len(x)), masks, strict=True):
            if not seal(x[part], self.limit, mask, block[part], self._inputs, sums[part], scales[part]):
                raise BadInput(f"{', '.join(self.names)}: activations that are not finite cannot be made integers")
        return block

    def _share(self, pads: Sequence[Pad], rows: int) -> torch.Tensor | None:
        """The second worker's share: the pads themselves, in memory that it alone maps."""
        if self._second is None or self._second_memory is None:
            return None
        block = self._second_memory.empty((rows, self._columns), torch.int32)
        for part, pad in zip(_parts([pad.masks for pad in pads], rows), pads, strict=True):
            block[part].copy_(pad.masks)
        return block

    def _open(
        self,
        call: int,
        result: torch.Tensor,
        taken_off: Sequence[torch.Tensor | None],
        sums: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        row = torch.empty(out.shape[1], dtype=torch.int32)
        for part, products in zip(_parts(taken_off, len(out)), taken_off, strict=True):
            wrong = open_rows(result[part], row, products, self._outputs, sums[part], scales[part], self._scales, self._bias, out[part])
            if wrong >= 0:
                raise self._session.reject(self.names, call, part.start + wrong)


def _parts(masks: Sequence[torch.Tensor | None], rows: int) -> Iterator[slice]:
    """The rows that each is for: all, where it is None."""
    first = 0
    for mask in masks:
        last = rows if mask is None else first + len(mask)
        yield slice(first, last)
        first = last


class SealedChannel:
    """All that the trust modes bind on a channel. It has no other op, and hands the channel to nobody."""

    def __init__(self, channel: Bindable, session: TrustSession, second: Bindable | None = None) -> None:
        """``second``: to a worker that is given the pads: with each call at ``shares``, ahead of time at ``blind``."""
        self.session = session
        self.memory = channel.memory
        self.second_memory = None if second is None else second.memory
        self._bind = channel.bind
        self._bind_second = None if second is None else second.bind

    def layer(
        self,
        names: Sequence[str],
        weight: IntegerWeight,
        widths: Sequence[int],
        bias: torch.Tensor | None,
        digests: Sequence[Mapping[str, str]],
    ) -> SealedLayer:
        """Bind the layers ``names`` of the workers' model. Raises :class:`BadInput` for a worker without them, or without the op."""
        static: dict[str, Any] = {
            "modules": list(names),
            "in_features": weight.integers.shape[1],
            "out_features": list(widths),
            "bits": weight.bits,
            "digests": list(digests),
        }
        op = self._bind(ops.RING_LINEAR, out_spec=ops.ring_linear, **static)
        second = None if self._bind_second is None else self._bind_second(ops.RING_LINEAR, out_spec=ops.ring_linear, **static)
        shares = self.session.options.mode is Trust.SHARES
        return SealedLayer(self, names, weight, widths, bias, op, second if shares else None, self._pads(weight, second, shares))

    def _pads(self, weight: IntegerWeight, second: Op | None, shares: bool) -> Pads | None:
        """The pads of a weight; None where rows are not masked."""
        session = self.session
        if session.alive is None:
            return None
        outputs, columns = weight.integers.shape
        ahead = session.options.pads
        if shares:  # the second worker finds what the weight makes of them
            pads = Pads(session.alive, columns, 0, lambda masks, products: None, 0, 1)
        elif second is not None:
            dealer = _Dealer(second, self.second_memory)
            pads = Pads(session.alive, columns, outputs, dealer.product, ahead, min(ahead or 1, _AHEAD_AT_ONCE))
        else:
            integers = weight.integers
            pads = Pads(
                session.alive,
                columns,
                outputs,
                lambda masks, products: product(masks, integers, products),
                ahead,
                min(ahead or 1, _AHEAD_AT_ONCE),
            )
        session.pads.append(pads)
        return pads


class _Dealer:
    """A second worker that multiplies pads ahead of time. What it gives is checked with the result that it is taken off from."""

    def __init__(self, op: Op, memory: ClientMemory | None) -> None:
        assert memory is not None
        self._op = op
        self._memory = memory

    def product(self, masks: torch.Tensor, products: torch.Tensor) -> None:
        block = self._memory.empty(tuple(masks.shape), torch.int32)
        block.copy_(masks)
        products.copy_(self._op(block))
