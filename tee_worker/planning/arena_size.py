"""How large an arena a run needs."""

from __future__ import annotations

from shmbroker.errors import ArenaTooSmall
from shmbroker.memory.layout import PAGE
from shmbroker.settings import MIB, parse_bytes
from tee_worker.planning.traffic import Traffic

ARENA_FLOOR = 64 * MIB
ARENA_LARGEST_TENSORS = 4
"""The arena that is asked for when none is told: room for so many tensors of the largest size of the run, on top of the floor. Attention has
scores, keys, values and a result at once."""


def arena_bytes(told: str | None, planned: Traffic, pipeline: int = 1, *, spare: int = 0) -> int:
    """Size of the arena: as told, if the run's largest tensor fits in it; else enough for the run, in whole pages. Raises :class:`ArenaTooSmall`.

    ``spare``: so many largest tensors more than it needs.
    """
    assert planned.largest is not None
    assert planned.largest_tensor is not None
    largest = planned.largest_tensor.nbytes
    if told is None:
        enough = ARENA_FLOOR + (ARENA_LARGEST_TENSORS + spare) * pipeline * largest
        return -(-enough // PAGE) * PAGE
    size = parse_bytes(told)
    if size < largest:
        raise ArenaTooSmall(
            f"--arena {told} is {size} bytes; the largest tensor of this run, {planned.largest_tensor} of op {planned.largest.op!r}, takes "
            f"{largest} bytes: give --arena at least {-(-ARENA_LARGEST_TENSORS * largest // MIB)}M (room for {ARENA_LARGEST_TENSORS} of them), "
            "or leave it out"
        )
    return size
