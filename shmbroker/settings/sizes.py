"""Sizes as people write them: ``512M`` in, ``3328.0 MiB`` out."""

from __future__ import annotations

import operator
import re

from shmbroker.errors import BadInput

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
MIB = 1 << 20


def parse_bytes(size: int | str) -> int:
    """``"512M"``, ``"1.5 GiB"``, ``"4096"`` or a number, in bytes; k, M, G and T are powers of 1024. Raises :class:`BadInput`."""
    if not isinstance(size, (str, bool)) and hasattr(size, "__index__"):
        value = operator.index(size)
    elif not isinstance(size, str):
        raise BadInput(f"size {size!r} cannot be read: give a number of bytes, or a text like '512M'")
    else:
        match = _SIZE.fullmatch(size)
        if match is None:
            raise BadInput(f"size {size!r} cannot be read: write a number of bytes, or e.g. 512M, 2G")
        value = int(float(match[1]) * 1024 ** _POWER[match[2].lower()])
    if not 0 < value < 1 << 60:
        raise BadInput(f"size {size!r} must be positive and below 2^60 bytes")
    return value


def mib(nbytes: int) -> str:
    """``3328.0 MiB``."""
    return f"{nbytes / MIB:.1f} MiB"
