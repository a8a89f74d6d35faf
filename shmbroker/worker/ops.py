"""Ops, as a worker registers them and as a client binds them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shmbroker.arena.spec import TensorSpec, spec_of
from shmbroker.errors import BadInput
from shmbroker.lane.outputs import Outputs, OutSpec

Static = dict[str, Any]
"""Arguments by name: fixed at bind, or of one call."""

_KNOWN_OUTPUTS = 1024
"""Outcomes of trying out that are remembered, per bound op."""


@dataclass(frozen=True, slots=True)
class OpDefinition:
    """An op as a worker registers it.

    ``function``: with a parameter ``out`` it writes its results there (one tensor, or a tuple of them); without, what it returns is copied
    into the client's block. ``per_bind``: it is called once for each bind, with the static arguments, and returns the function to run; with
    a parameter ``channel_state`` it is also given a dict of the channel's own, which ends with the channel.

    Inputs are read, and end with the call. ``copies_inputs``: each call is given copies, to keep or to write into. ``in_place``: what it writes into its
    inputs is for its callers, whose tensors then have it.
    """

    name: str
    function: Callable[..., Any]
    out_spec: OutSpec | None = None
    per_bind: bool = False
    copies_inputs: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.copies_inputs and self.in_place:
            raise BadInput(f"op {self.name!r} cannot have copies of its inputs and write into them in place: choose one")
        if self.out_spec is None and (self.per_bind or "out" in inspect.signature(self.function).parameters):
            raise BadInput(
                f"op {self.name!r} writes into out or is made at bind: it needs an out_spec, a function from the inputs' specs to the "
                "outputs' (only an op that returns its results can be tried out for their shapes)"
            )

    def bind(self, static: Static, channel_state: dict[str, Any]) -> BoundOp:
        """The op with its static arguments fixed. Errors are the op's own, for the client that binds."""
        function = self.function
        if self.per_bind and "channel_state" in inspect.signature(function).parameters:
            function = function(**static, channel_state=channel_state)
        elif self.per_bind:
            function = function(**static)
        return BoundOp(self, function, {} if self.per_bind else static, static)


class BoundOp:
    """An op with its static arguments: what a client's small integer stands for.

    Run by one thread at a time; :meth:`outputs` is called by that one and by the control thread, which share a dict that each changes in single steps.
    """

    __slots__ = ("_definition", "_function", "_known", "_kwargs", "_proven", "_static", "_takes_out", "in_place", "name")

    def __init__(self, definition: OpDefinition, function: Callable[..., Any], kwargs: Static, static: Static) -> None:
        self._definition = definition
        self._function = function
        self._kwargs = kwargs
        self._static = static
        self._known: dict[object, Outputs] = {}
        self.name = definition.name
        self.in_place = definition.in_place
        self._takes_out = "out" in inspect.signature(function).parameters
        self._proven: set[object] = set()
        """Kinds of calls in which the op was seen to leave its inputs alone."""

    def outputs(self, inputs: Sequence[TensorSpec], arguments: Static) -> Outputs:
        """Specs of the outputs for such inputs: from the out_spec, else from a run on torch's ``meta`` device, which computes nothing.

        An op without an out_spec is tried out once for such inputs and arguments. Raises :class:`BadInput` when that fails.
        """
        if self._definition.out_spec is not None:
            return Outputs.of(self._definition.out_spec(*inputs, **self._static))
        key = (tuple(inputs), repr(arguments))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _KNOWN_OUTPUTS:
                self._known.clear()
            known = self._known[key] = self._try_out(inputs, arguments)
        return known

    def _try_out(self, inputs: Sequence[TensorSpec], arguments: Static) -> Outputs:
        shells = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in inputs]
        try:
            result = self._function(*shells, **self._kwargs, **arguments)
        except Exception as error:
            raise BadInput(
                f"op {self.name!r} has no out_spec, and trying it out for {', '.join(map(str, inputs))} on torch's meta device, which has shapes "
                f"and no values, failed: {type(error).__name__}: {error}; if the op needs values for that, give it an out_spec"
            ) from None
        results = self._tensors(result)
        return Outputs(tuple(spec_of(tensor) for tensor in results), isinstance(result, torch.Tensor))

    def _tensors(self, result: object) -> Sequence[torch.Tensor]:
        if isinstance(result, torch.Tensor):
            return [result]
        if isinstance(result, (tuple, list)) and all(isinstance(one, torch.Tensor) for one in result):
            return result
        raise BadInput(
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
        return functools.partial(function, *inputs, out=out, **self._kwargs, **arguments)

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
            raise BadInput(f"op {self.name!r} returned {len(results)} tensors where {len(outputs)} were foretold")
        for room, value in zip(outputs, results, strict=True):
            if room.shape != value.shape or room.dtype != value.dtype:
                raise BadInput(f"op {self.name!r} returned {spec_of(value)} where {spec_of(room)} was foretold")
            room.copy_(value)
