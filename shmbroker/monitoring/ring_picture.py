"""An arena drawn in one line of letters: what is held, what is free, and where the cursor stands."""

from __future__ import annotations

from shmbroker.monitoring.figures import ArenaFigures

FULL, PARTLY, FREE, CURSOR = "#", "+", ".", "^"


def draw_ring(arena: ArenaFigures, offset: int, width: int) -> tuple[str, str]:
    """The arena, which begins at ``offset`` of its segment, in ``width`` letters, and a line with the cursor below it.

    A letter stands for ``total_bytes / width`` bytes: ``#`` when all of them are held, ``+`` when some are, ``.`` when none is.
    """
    cell = arena.total_bytes / width
    held = [0.0] * width
    for block in arena.blocks:
        begin, end = block.offset - offset, block.offset - offset + block.nbytes
        for index in range(int(begin / cell), min(width, int(end / cell) + 1)):
            held[index] += max(0.0, min(end, (index + 1) * cell) - max(begin, index * cell))
    bar = "".join(FREE if not nbytes else FULL if nbytes > cell * 0.999 else PARTLY for nbytes in held)
    cursor = min(width - 1, int((arena.cursor - offset) / cell))
    return bar, " " * cursor + CURSOR
