"""The trust modes: what the GPU worker is trusted with, and what each mode needs. Needs no torch.

T4  Nothing below the setting ``trust_floor`` is started; no flag, file or variable lowers it.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from shmbroker.errors import BadInput
from shmbroker.settings import current
from shmbroker.settings.arguments import whole
from shmbroker.trust.bits import check_bits


class Trust(str, enum.Enum):
    """From least to most that is kept from the worker."""

    PLAIN = "plain"
    """It sees what it computes on, and is believed."""
    VERIFY = "verify"
    """It sees what it computes on, and a wrong result is rejected."""
    SHARES = "shares"
    """It sees nothing but sizes as long as it does not work together with a second one."""
    BLIND = "blind"
    """It sees nothing but sizes."""

    @property
    def rank(self) -> int:
        """Among the modes."""
        return list(Trust).index(self)

    @property
    def hides(self) -> bool:
        """Whether activations are kept from the worker."""
        return self in (Trust.BLIND, Trust.SHARES)


class Arithmetic(str, enum.Enum):
    """How ``verify`` computes."""

    EXACT = "exact"
    """On integers: a wrong result passes with probability 2^-64."""
    FLOAT = "float"
    """As ``plain`` computes, in float32: deviations below the rounding pass. Approximate."""


_BITS = 12
_PADS = 64


class TrustOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A mode, and what it can be asked for. Raises :class:`BadInput` for what does not fit together."""

    mode: Trust = Trust.PLAIN
    arithmetic: Arithmetic = Arithmetic.EXACT
    bits: int = _BITS
    """Of a weight: 8, 12 or 14."""
    pads: int = _PADS
    """To have ready for each weight, in rows (tokens)."""
    hide_lengths: int = 1
    """Rows of each call are padded to a multiple of it."""
    same_host_shares: bool = False
    """Whether two workers on one host are taken for two, though they hide nothing from that host."""

    def __post_init__(self) -> None:
        if self.arithmetic is Arithmetic.FLOAT and self.mode is not Trust.VERIFY:
            raise BadInput(f"arithmetic 'float' is of mode 'verify'; mode {self.mode.value!r} is exact, or believes the worker")
        if self.bits != _BITS and not self.ring:
            raise BadInput(f"bits are of the exact modes: at {self} weights are as the model has them")
        if self.pads != _PADS and self.mode is not Trust.BLIND:
            raise BadInput(f"pads are made ahead at mode 'blind' alone, not at {self}")
        check_bits(self.bits)
        for name, least in (("pads", 0), ("hide_lengths", 1)):
            if whole(name, getattr(self, name)) < least:
                raise BadInput(f"{name} {getattr(self, name)} must be {least} or more rows")
        if self.hide_lengths > 1 and not self.mode.hides:
            raise BadInput(f"hide_lengths is of modes 'blind' and 'shares': at {self.mode.value!r} the worker sees every row as it is")

    @classmethod
    def named(cls, told: TrustOptions | Trust | str) -> TrustOptions:
        """From the name of a mode, too. Raises :class:`BadInput`."""
        if isinstance(told, TrustOptions):
            return told
        return cls(mode=mode_named(told))

    @property
    def ring(self) -> bool:
        """Whether products are of integers."""
        return self.mode is not Trust.PLAIN and self.arithmetic is Arithmetic.EXACT

    @property
    def rounding(self) -> float:
        """Of a weight, as a share of the largest of its row; 0 where weights are as the model has them."""
        return 2.0**-self.bits if self.ring else 0.0

    def rank(self, *, dealt: bool = False) -> int:
        """Beside a floor. ``dealt``: a second worker makes the pads, which hides what two workers hide.

        That is little more than nothing where both are on one host.
        """
        if dealt or self.mode is Trust.SHARES:
            return Trust.VERIFY.rank if self.same_host_shares else Trust.SHARES.rank
        if self.arithmetic is Arithmetic.FLOAT:
            return Trust.VERIFY.rank - 1  # approximate: no floor but plain is met by it
        return self.mode.rank

    def check_floor(self, *, dealt: bool = False) -> None:
        """Raise :class:`BadInput` for a mode below the setting ``trust_floor``, wherever that was set."""
        floor = Trust(current().trust_floor)
        if self.rank(dealt=dealt) < floor.rank:
            raise BadInput(
                f"trust {self} is below the floor that is set here, trust_floor = {floor.value!r}: give --trust {floor.value} or more (of the values in files "
                "and variables the highest counts)"
            )

    def __str__(self) -> str:
        return f"{self.mode.value!r}" + (" with arithmetic 'float'" if self.arithmetic is Arithmetic.FLOAT else "")

    def told(self) -> str:
        """What the mode means, in one line."""
        return _TOLD["float" if self.arithmetic is Arithmetic.FLOAT else self.mode.value]


PLAIN = TrustOptions()

_SIZES = "prompt length, number of tokens, the model, timing"

_TOLD: dict[str, str] = {
    "plain": "the GPU worker sees every activation, and its results are believed",
    "verify": "the GPU worker sees every activation; a wrong result is rejected (passes with probability 2^-64)",
    "float": "the GPU worker sees every activation; a wrong result is rejected approximately: deviations within rounding pass",
    "blind": f"the GPU worker sees masked rows; a wrong result is rejected; not hidden: {_SIZES}",
    "shares": f"each of two workers sees random rows, unless they work together; a wrong result is rejected; not hidden: {_SIZES}",
}


def mode_named(told: Any) -> Trust:
    """The mode. Raises :class:`BadInput`."""
    try:
        return Trust(told)
    except ValueError:
        raise BadInput(f"trust {told!r} is not known; there are: {', '.join(one.value for one in Trust)}") from None


def arithmetic_named(told: Any) -> Arithmetic:
    """The arithmetic. Raises :class:`BadInput`."""
    try:
        return Arithmetic(told)
    except ValueError:
        raise BadInput(f"arithmetic {told!r} is not known; there are: {', '.join(one.value for one in Arithmetic)}") from None
