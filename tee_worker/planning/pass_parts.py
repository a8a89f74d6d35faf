"""How one forward pass is cut into parts that are on their way at once: several sequences into micro-batches, one long prompt into chunks."""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST_CHUNK = 32
"""Tokens: a prompt is not cut into shorter chunks, whose matrix products would wait for the weights rather than compute."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows (sequences) and tokens of a pass."""

    first_row: int
    rows: int
    first_token: int
    tokens: int


def parts_of(batch: int, tokens: int, ways: int) -> tuple[Part, ...]:
    """At most ``ways`` parts of nearly the same size; one where there is nothing to gain. The longer ones come first."""
    if batch > 1:
        return tuple(Part(first, count, 0, tokens) for first, count in _cut(batch, min(ways, batch)))
    return tuple(Part(0, batch, first, count) for first, count in _cut(tokens, max(1, min(ways, tokens // SHORTEST_CHUNK))))


def _cut(whole: int, ways: int) -> list[tuple[int, int]]:
    base, longer = divmod(whole, ways)
    counts = [base + (index < longer) for index in range(ways)]
    return [(sum(counts[:index]), count) for index, count in enumerate(counts)]
