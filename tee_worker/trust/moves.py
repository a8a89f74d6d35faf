"""Moving a model's linear layers to a worker that is not trusted. The embedding stays, and so does all that is no product with a weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shmbroker.client import Bindable
from shmbroker.errors import BadInput
from shmbroker.models import digests_of, name_without_adapter, weight_and_bias
from shmbroker.trust.quantization import joined, quantize_weight
from tee_worker.offloading.remote_modules import FusedCall, remote_linear
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure
from tee_worker.trust.float_check import FloatLayer, check_dtype
from tee_worker.trust.modes import Arithmetic, Trust, TrustOptions
from tee_worker.trust.roles import Roles
from tee_worker.trust.sealed import SealedChannel
from tee_worker.trust.session import TrustSession
from tee_worker.trust.supply import PadSupply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layer = Callable[[torch.Tensor], Any]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A model's session with workers that are not trusted."""

    session: TrustSession
    supply: PadSupply | None

    def close(self) -> None:
        """Make no more pads, and wipe those there are."""
        if self.supply is not None:
            self.supply.stop()
        if self.session.alive is not None:
            self.session.alive.end()
        for pads in self.session.pads:
            pads.close()
        if self.supply is not None:
            self.supply.join()


def check_split(splits: Splits, options: TrustOptions) -> None:
    """Raise :class:`BadInput` for a split at which more than products with weights leaves."""
    if options.mode is Trust.PLAIN:
        return
    for split in splits.used():
        if split not in (Split.LINEAR, Split.FUSED):
            raise BadInput(
                f"split {split.value!r} is not possible at trust {options.mode.value!r}: {_REASONS[split]}; use split 'linear' or 'fused', or --trust plain"
            )


_REASONS = {
    Split.OP: "attention would be computed by the worker, from queries and keys that only it could check",
    Split.BLOCK: "the worker would keep keys and values, and compute what no check of products covers",
    Split.LAYER: "the worker would keep keys and values, and compute what no check of products covers",
}


class SealedMoves:
    """The linear layers of one model: first everything is bound, which a worker may refuse, then everything is moved."""

    def __init__(
        self,
        model: PreTrainedModel,
        channel: Bindable,
        structure: Structure,
        splits: Splits,
        options: TrustOptions,
        second: Bindable | None,
    ) -> None:
        """``second``: as of :func:`tee_worker.offloading.offload.offload`."""
        check_split(splits, options)
        if options.arithmetic is Arithmetic.FLOAT:
            check_dtype(structure.dtype)
        self._roles = Roles(channel, second, options)
        self._model = model
        self._structure = structure
        self._splits = splits
        self._options = options
        self._channel = channel
        made = "here" if second is None else f"by {self._roles.second_name()}"
        self.session = TrustSession(options, self._roles.names, self._roles.keep_apart, made)
        self._seals = SealedChannel(channel, self.session, second)
        self._moves: list[Callable[[], None]] = []

    def bind(self) -> None:
        """Bind every layer, from its weight. Raises :class:`BadInput` where one is not here, or cannot be computed so."""
        structure, seen = self._structure, set[str]()
        for projection in structure.projections:
            if len(projection.names) == 1 or structure.split_of(projection.names[0], self._splits) is Split.LINEAR:
                for name in projection.names:
                    if name not in seen:
                        seen.add(name)
                        self._move([name])
            else:
                self._move(projection.names)
        self._move(structure.head.names, head=True)

    def move(self) -> Sealed:
        """Replace everything, and begin to make pads."""
        for move in self._moves:
            move()
        self._roles.tell(self.session.counts)
        ahead = any(pads.target for pads in self.session.pads)
        return Sealed(self.session, PadSupply(self.session) if ahead else None)

    def _move(self, names: Sequence[str], *, head: bool = False) -> None:
        layer = self._layer(names, head=head)
        call = FusedCall(layer, len(names)) if len(names) > 1 else None
        for index, name in enumerate(names):
            share = layer if call is None else functools.partial(call.take, index)
            self._moves.append(functools.partial(remote_linear, self._model.get_submodule(name), name, share, self._structure.dtype))

    def _layer(self, names: Sequence[str], *, head: bool) -> Layer:
        modules = [self._model.get_submodule(name) for name in names]
        weights, biases = [], []
        for name, module in zip(names, modules, strict=True):
            weight, bias, transposed = weight_and_bias(module)
            if weight is None or weight.is_meta:
                raise BadInput(
                    f"trust {self._options.mode.value!r} needs the weights here, to check by: {name} was loaded without; load the whole model"
                )
            weights.append(weight.t() if transposed else weight)
            biases.append(bias)
        digests = [digests_of(module) for module in modules]
        plain = [name_without_adapter(name) for name in names]
        if self._options.arithmetic is Arithmetic.FLOAT:
            return FloatLayer(self._channel, self.session, plain, weights, biases, digests, head=head)
        quantized = joined([quantize_weight(weight, self._options.bits) for weight in weights])
        widths = [len(weight) for weight in weights]
        bias = None
        if any(one is not None for one in biases):
            bias = torch.cat(
                [torch.zeros(width) if one is None else one.detach().float() for one, width in zip(biases, widths, strict=True)]
            )
        return self._seals.layer(plain, quantized, widths, bias, digests)
