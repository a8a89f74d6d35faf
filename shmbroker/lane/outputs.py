"""The outputs of a call, as both sides know them beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shmbroker.arena.spec import TensorSpec
from shmbroker.errors import BadInput

OutSpec = Callable[..., TensorSpec | Sequence[TensorSpec]]
"""``out_spec(*input_specs, **static)``: a pure function of shapes and dtypes, run by both sides."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a call as specs; ``single`` when the op gives one tensor rather than a sequence."""

    specs: tuple[TensorSpec, ...]
    single: bool

    @classmethod
    def of(cls, told: TensorSpec | Sequence[TensorSpec]) -> Outputs:
        """From what an ``out_spec`` returned. Raises :class:`BadInput` for anything else."""
        if isinstance(told, TensorSpec):
            return cls((told,), True)
        specs = tuple(told) if isinstance(told, Iterable) else (told,)
        if not all(isinstance(spec, TensorSpec) for spec in specs):
            raise BadInput(f"an out_spec returns a TensorSpec or a sequence of them, not {told!r}")
        return cls(specs, False)
