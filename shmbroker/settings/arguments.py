"""Numbers that a caller gives in Python, checked where they come in: what is none gets one line that says what to give."""

from __future__ import annotations

import math
import operator
from numbers import Real

from shmbroker.errors import BadInput


def seconds(name: str, value: object) -> float:
    """``value`` as a duration, 0 or more. Raises :class:`BadInput` that names the argument."""
    number = _number(value)
    if not number >= 0:
        raise BadInput(f"{name} {value!r} must be a number of seconds, 0 or more")
    return number


def seconds_or_none(name: str, value: object) -> float | None:
    """A positive duration, or None for no limit. Raises :class:`BadInput` that names the argument."""
    if value is None:
        return None
    number = _number(value)
    if not number > 0:
        raise BadInput(f"{name} {value!r} must be a positive number of seconds, or None for no limit")
    return number


def whole(name: str, value: object) -> int:
    """``value`` as a whole number of Python. Raises :class:`BadInput` that names the argument."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BadInput(f"{name} {value!r} must be a whole number") from None


def _number(value: object) -> float:
    """NaN, which no bound lets pass, for what is no number."""
    return float(value) if isinstance(value, Real) else math.nan
