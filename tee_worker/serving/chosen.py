"""A token as it was chosen. Needs no torch."""

from __future__ import annotations

import msgspec


class Chosen(msgspec.Struct, frozen=True, array_like=True):
    """A token with its log probability, by the model, before sampling changes anything; ``top``: the likeliest, with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
