"""How long a call may take, as its caller says it."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from shmbroker.settings.arguments import seconds_or_none


class _Unset(Enum):
    """The type of ``timeout`` when the client's own is meant."""

    UNSET = 0


UNSET = _Unset.UNSET
Timeout = float | None | Literal[_Unset.UNSET]


def nanoseconds_of(timeout: float) -> int:
    """A timeout as a frame can carry it: positive, and 30 years at most. Raises :class:`BadInput`."""
    checked = seconds_or_none("timeout", timeout)
    assert checked is not None
    return int(min(checked, 1e9) * 1e9)
