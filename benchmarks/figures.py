"""The times among a benchmark's figures, whatever their shape: so that two runs can be laid side by side."""

from __future__ import annotations

from collections.abc import Iterator

TAILS = ("_ns", "_us", "_ms", "seconds")
"""How the name of a time ends, or of what holds times."""

LEFT_OUT = "p99"
"""How the name begins of what differs too much from run to run."""


def times(figures: object) -> dict[str, float]:
    """Every time by its path, e.g. ``sizes/64/floor: semaphore/median_us``, each in the unit that its path names."""
    return dict(_times(figures, (), False))


def _times(figures: object, path: tuple[str, ...], timed: bool) -> Iterator[tuple[str, float]]:
    if isinstance(figures, dict):
        for name, inner in figures.items():
            if not name.startswith(LEFT_OUT):
                yield from _times(inner, (*path, name), timed or name.endswith(TAILS))
    elif isinstance(figures, list):
        for number, inner in enumerate(figures):
            yield from _times(inner, (*path, str(number)), timed)
    elif timed and isinstance(figures, (int, float)):
        yield "/".join(path), float(figures)
