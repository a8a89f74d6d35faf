"""Ops, as a worker registers them and as a client binds them."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shmbroker.arena.spec import TensorSpec, spec_of
from shmbroker.errors import BadInput
from shmbroker.lane.outputs import Outputs, OutSpec
from shmbroker.worker.counters import bound
from shmbroker.worker.pieces import Pieces, PieceSize, TilePieces, is_long, pieces_by_row

Static = dict[str, Any]
"""Arguments by name: fixed at bind, or of one call."""

_KNOWN_OUTPUTS = 1024
"""Outcomes of trying out that are remembered, per op."""


def warm_up() -> None:
    """Have torch load what its first op on the ``meta`` device needs: some 800 modules, whose seconds would otherwise be a call's."""
    _ = torch.empty(1, device="meta") * 2


class OpFailed(Exception):
    """What an op's own code raised (``__cause__``) when it was bound or asked for its shapes; the text tells when."""

    @property
    def error(self) -> BaseException:
        """The op's."""
        assert self.__cause__ is not None
        return self.__cause__


@dataclass(frozen=True, slots=True)
class OpDefinition:
    """An op as a worker registers it.

    ``function``: with a parameter ``out`` it writes its results there (one tensor, or a tuple of them); without, what it returns is copied
    into the client's block. ``per_bind``: it is called once for each bind, with the static arguments, and returns the function to run; with
    a parameter ``channel_state`` it is also given a dict of the channel's own, which ends with the channel.

    Inputs are read, and end with the call. ``copies_inputs``: each call is given copies, to keep or to write into. ``in_place``: what it writes into its
    inputs is for its callers, whose tensors then have it. ``row_wise``: each row of its outputs (all dimensions but the last) depends on the same row of
    its inputs alone, so a long call may be run in pieces, and short ones of several clients together.
    """

    name: str
    function: Callable[..., Any]
    out_spec: OutSpec | None = None
    per_bind: bool = False
    copies_inputs: bool = False
    in_place: bool = False
    row_wise: bool = False
    known: dict[object, Outputs] = field(default_factory=dict, repr=False, compare=False)
    """Outcomes of trying it out, by static arguments, inputs and arguments: shared by all binds of all clients, changed in single steps."""

    def __post_init__(self) -> None:
        if self.copies_inputs and self.in_place:
            raise BadInput(f"op {self.name!r} cannot have copies of its inputs and write into them in place: choose one")
        if self.row_wise and self.in_place:
            raise BadInput(f"op {self.name!r} cannot write into its inputs in place and be run row by row: choose one")
        if self.out_spec is None and (self.per_bind or "out" in inspect.signature(self.function).parameters):
            raise BadInput(
                f"op {self.name!r} writes into out or is made at bind: it needs an out_spec, a function from the inputs' specs to the "
                "outputs' (only an op that returns its results can be tried out for their shapes)"
            )

    @property
    def is_batchable(self) -> bool:
        """Whether the rows of calls of several clients may be computed together, where the worker does such."""
        own = self.per_bind and "channel_state" in inspect.signature(self.function).parameters
        return self.row_wise and not self.copies_inputs and not own

    def bind(self, static: Static, channel_state: dict[str, Any]) -> BoundOp:
        """The op with its static arguments fixed. Raises :class:`BadInput` for those it does not take, :class:`OpFailed` for what it raises."""
        function = self.function
        if not self.per_bind:
            return BoundOp(self, function, static, static)
        signature = inspect.signature(function)
        told = {**static, "channel_state": channel_state} if "channel_state" in signature.parameters else static
        try:
            signature.bind_partial(**told)  # a wrong name is a better hint than the right one that is missing
            signature.bind(**told)
        except TypeError as error:
            raise BadInput(f"op {self.name!r} cannot be bound with {sorted(static)}: {error}") from None
        try:
            return BoundOp(self, function(**told), {}, static)
        except BaseException as error:  # SystemExit too: the worker lives on
            raise OpFailed(f"when it was bound with {sorted(static)}") from error


class BoundOp:
    """An op with its static arguments: what a client's small integer stands for.

    Run by one thread at a time, which may look up :meth:`known_outputs` while the control thread tries the op out (:meth:`outputs`).
    """

    __slots__ = (
        "_definition",
        "_function",
        "_kwargs",
        "_piece_size",
        "_proven",
        "_static",
        "_static_digest",
        "_takes_out",
        "batch_key",
        "in_place",
        "name",
    )

    def __init__(self, definition: OpDefinition, function: Callable[..., Any], kwargs: Static, static: Static) -> None:
        self._definition = definition
        self._function = function
        self._kwargs = kwargs
        self._static = static
        self._static_digest = hashlib.blake2b(repr(static).encode("utf-8", "replace")).digest()
        """Short, as a client's arguments need not be: outcomes are remembered by it."""
        self.name = definition.name
        self.in_place = definition.in_place
        self.batch_key = (definition.name, self._static_digest) if definition.is_batchable else None
        """What calls have in common whose rows may be computed together, whoever bound the op; None where they may not."""
        self._takes_out = "out" in inspect.signature(function).parameters
        self._proven: set[object] = set()
        """Kinds of calls in which the op was seen to leave its inputs alone."""
        self._piece_size = PieceSize(1, 1) if hasattr(function, "tiles") else PieceSize()

    def outputs(self, inputs: Sequence[TensorSpec], arguments: Static) -> Outputs:
        """Specs of the outputs for such inputs: from the out_spec, else from a run on torch's ``meta`` device, which computes nothing.

        An op without an out_spec is tried out once for such inputs, static arguments and arguments, whoever asks, and however often it is bound.
        Raises :class:`OpFailed` with what the op, or its out_spec, raises; :class:`BadInput` for arguments that it does not take.
        """
        if self._definition.out_spec is not None:
            try:
                return self._foretold(inputs)
            except BaseException as error:
                raise OpFailed(f"in its out_spec for {_listed(inputs)}") from error
        outcomes, key = self._definition.known, self._key(inputs, arguments)
        known = outcomes.get(key)
        if known is None:
            known = self._try_out(inputs, arguments)
            if len(outcomes) >= _KNOWN_OUTPUTS:
                outcomes.clear()
            outcomes[key] = known
        return known

    def known_outputs(self, inputs: Sequence[TensorSpec], arguments: Static) -> Outputs | None:
        """:meth:`outputs` as far as they are known without a run: None for an op that would have to be tried out. Raises what the out_spec does."""
        if self._definition.out_spec is not None:
            return self._foretold(inputs)
        return self._definition.known.get(self._key(inputs, arguments))

    def _foretold(self, inputs: Sequence[TensorSpec]) -> Outputs:
        assert self._definition.out_spec is not None
        return Outputs.of(self._definition.out_spec(*inputs, **self._static))

    def _key(self, inputs: Sequence[TensorSpec], arguments: Static) -> object:
        return self._static_digest, tuple(inputs), repr(arguments)

    def _try_out(self, inputs: Sequence[TensorSpec], arguments: Static) -> Outputs:
        try:
            inspect.signature(self._function).bind(*inputs, **self._kwargs, **arguments)
        except TypeError as error:
            raise BadInput(f"op {self.name!r} cannot be called so: {error}") from None
        shells = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in inputs]
        try:
            result = self._function(*shells, **self._kwargs, **arguments)
            return Outputs(tuple(spec_of(tensor) for tensor in self._tensors(result)), isinstance(result, torch.Tensor))
        except BaseException as error:
            raise OpFailed(
                f"when it was tried out for {_listed(inputs)} on torch's meta device, which has shapes and no values (if it needs values, give it an out_spec)"
            ) from error

    def _tensors(self, result: object) -> Sequence[torch.Tensor]:
        if isinstance(result, torch.Tensor):
            return [result]
        if isinstance(result, (tuple, list)) and all(isinstance(one, torch.Tensor) for one in result):
            return result
        raise TypeError(
            f"op {self.name!r} returned {type(result).__name__}: an op returns a tensor or a tuple of tensors, or writes into out"
        )

    def prepare(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], arguments: Static, *, single: bool
    ) -> Callable[[], object]:
        """A call on these very tensors that writes all results into ``outputs``; it may be run again and again."""
        if not self._takes_out:
            return functools.partial(self._run_and_copy, inputs, outputs, arguments)
        out = outputs[0] if single else tuple(outputs)
        function = self._with_copies if self._definition.copies_inputs else self._function
        return bound(function, *inputs, out=out, **self._kwargs, **arguments)

    def pieces(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], arguments: Static, *, single: bool) -> Pieces | None:
        """The same call as pieces; None where the op cannot be divided, or the call is no longer than one."""
        if not is_long(outputs):
            return None
        tiles = getattr(self._function, "tiles", None)
        if tiles is not None and not self._definition.copies_inputs:
            out = outputs[0] if single else tuple(outputs)
            return TilePieces(functools.partial(tiles, *inputs, out=out, **self._kwargs, **arguments), self._piece_size)
        if not self._definition.row_wise:
            return None
        return pieces_by_row(lambda some, room: self.prepare(some, room, arguments, single=single), inputs, outputs, self._piece_size)

    def is_proven(self, kind: object) -> bool:
        """Whether a call of this ``kind`` has left its inputs alone, or may do with them what it likes."""
        return self.in_place or self._definition.copies_inputs or kind in self._proven

    def prove(self, kind: object) -> None:
        """A call of this ``kind`` was tried out on copies, and has left them alone."""
        if len(self._proven) < _KNOWN_OUTPUTS:
            self._proven.add(kind)

    def _with_copies(self, *inputs: torch.Tensor, **options: Any) -> object:
        return self._function(*[tensor.clone() for tensor in inputs], **options)

    def _run_and_copy(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], arguments: Static) -> None:
        function = self._with_copies if self._definition.copies_inputs else self._function
        results = self._tensors(function(*inputs, **self._kwargs, **arguments))
        if len(results) != len(outputs):
            raise ValueError(f"op {self.name!r} returned {len(results)} tensors where {len(outputs)} were foretold")
        for room, value in zip(outputs, results, strict=True):
            if room.shape != value.shape or room.dtype != value.dtype:
                raise ValueError(f"op {self.name!r} returned {spec_of(value)} where {spec_of(room)} was foretold")
            room.copy_(value)


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "no inputs"
