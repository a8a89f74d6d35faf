"""The splits: how much of each layer the GPU worker computes, from most to least private."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from shmbroker.errors import BadInput


class Split(str, enum.Enum):
    """What is one call."""

    LINEAR = "linear"
    """Each linear layer alone."""
    FUSED = "fused"
    """Linear layers that take the same input together: q+k+v, o, gate+up, down. Attention stays in the TEE."""
    OP = "op"
    """As ``fused``, and the two matrix products of attention; softmax stays in the TEE."""
    BLOCK = "block"
    """A layer's attention with its projections, and its feed-forward; norms and residual sums stay in the TEE. Keys and values are on the worker."""
    LAYER = "layer"
    """A whole decoder layer, its keys and values kept on the worker."""

    @property
    def stateful(self) -> bool:
        """Whether keys and values are kept on the worker."""
        return self in (Split.BLOCK, Split.LAYER)


SPLIT_NAMES = ", ".join(split.value for split in Split)

_RANGE = re.compile(r"([a-z]+):(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Splits:
    """One split for all layers, or one for each range of them: ``op``, or ``fused:0-3,layer:4-27,fused:28-29``."""

    ranges: tuple[tuple[Split, int, int | None], ...]
    """Split, first layer, last layer (None: to the end); one after the other, beginning at 0."""

    @classmethod
    def named(cls, text: str | Split | Splits) -> Splits:
        """From a name, or from ranges of layers, counted from 0, that follow one another. Raises :class:`BadInput`."""
        if isinstance(text, Splits):
            return text
        if ":" not in text:
            return cls(((_split(text), 0, None),))
        ranges: list[tuple[Split, int, int | None]] = []
        following = 0
        for part in text.split(","):
            found = _RANGE.fullmatch(part.strip())
            if found is None:
                raise BadInput(f"split {text!r}: {part.strip()!r} is not SPLIT:FIRST-LAST, e.g. fused:0-3,layer:4-27,fused:28-29")
            first, last = int(found[2]), int(found[3] or found[2])
            if first != following or last < first:
                raise BadInput(
                    f"split {text!r}: {part.strip()!r} should begin at layer {following}, where the range before it ends, and go upwards"
                )
            ranges.append((_split(found[1]), first, last))
            following = last + 1
        return cls(tuple(ranges))

    def __str__(self) -> str:
        if self.uniform is not None:
            return self.uniform.value
        return ",".join(f"{split.value}:{first}-{last}" for split, first, last in self.ranges)

    @property
    def uniform(self) -> Split | None:
        """The split of all layers, where it is one."""
        split, _, last = self.ranges[0]
        return split if last is None else None

    def used(self) -> set[Split]:
        """All that any layer has."""
        return {split for split, _, _ in self.ranges}

    def of_layers(self, count: int) -> tuple[Split, ...]:
        """The split of each of ``count`` layers. Raises :class:`BadInput` when the ranges are for another number of layers."""
        if self.uniform is not None:
            return (self.uniform,) * count
        end = self.ranges[-1][2]
        if end != count - 1:
            raise BadInput(f"split {self}: the model has {count} layers, 0 to {count - 1}; the ranges end at {end}")
        return tuple(split for split, first, last in self.ranges for _ in range(first, (last or first) + 1))

    @property
    def outside(self) -> Split:
        """For linear layers that are in no decoder layer."""
        return Split.LINEAR if Split.LINEAR in self.used() else Split.FUSED


def _split(name: str) -> Split:
    try:
        return Split(name)
    except ValueError:
        raise BadInput(f"split {name!r} is not known; there are: {SPLIT_NAMES}") from None
