"""How wide a weight may be as an integer. Needs no torch."""

from __future__ import annotations

from shmbroker.errors import BadInput

BITS = (8, 12, 14)


def check_bits(bits: int) -> None:
    """Raise :class:`BadInput` for bits that there are not."""
    if bits not in BITS:
        raise BadInput(f"weights of {bits} bits are not known; there are: {', '.join(map(str, BITS))}")
