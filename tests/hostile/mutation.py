"""Frames with every field mutated, a queue full at a time: made with NumPy, since many are wanted and the worker must be the slower one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shmbroker.memory import layout
from shmbroker.memory.layout import SubmissionFrame, TensorDescriptor
from tests.hostile.peer import Bytes, field_bytes

WIDTHS = (1, 2, 4, 8)

TIMES_AND_IDS = ("call_id", "deadline_ns", "submitted_ns")
COUNTED_TENSORS = 4
"""Descriptors that are mutated: those that the frames here use, and one behind them."""

WHOLE_SHARE, WILD_SHARE = 0.05, 0.03
"""Of frames that are left as they are, and of those that are nothing but noise."""

MUTATIONS = (1, 1, 1, 2, 2, 4, 8)
"""Fields changed in one frame."""


def _places() -> list[tuple[int, int]]:
    """Offset and width of every scalar that a peer can write, but for the sequence number."""
    places = [_place(SubmissionFrame, name) for name in TIMES_AND_IDS]
    places += [_place(SubmissionFrame, name) for name in ("op_id", "input_count", "output_count", "flags", "metadata_bytes")] * 3
    generations = field_bytes(SubmissionFrame, "generations")
    places += [(at, 4) for at in range(generations.start, generations.stop, 4)]
    for index in range(COUNTED_TENSORS):
        at = SubmissionFrame.tensors.offset + index * ctypes.sizeof(TensorDescriptor)
        scalars = [_place(TensorDescriptor, name) for name in ("offset", "nbytes", "dtype", "ndim", "space", "flags", "reserved")]
        for name in ("shape", "strides"):
            array = field_bytes(TensorDescriptor, name)
            scalars += [(start, 8) for start in range(array.start, array.stop, 8)]
        places += [(at + start, width) for start, width in scalars]
    metadata = field_bytes(SubmissionFrame, "metadata")
    places += [(at, 1) for at in range(metadata.start, metadata.start + 8)]
    return places


def _place(structure: type[ctypes.Structure], name: str) -> tuple[int, int]:
    found = field_bytes(structure, name)
    return found.start, found.stop - found.start


def nasty_values(arena: range) -> list[int]:
    """Around every bound that a reader may get wrong."""
    edges = [0, arena.start, arena.stop, len(arena), 1 << 8, 1 << 16, 1 << 31, 1 << 32, 1 << 61, 1 << 62, 1 << 63, 1 << 64, 128, 960, 2048]
    around = [edge + step for edge in edges for step in (-256, -8, -2, -1, 0, 1, 2, 8, 256)]
    return [value % (1 << 64) for value in [*around, *range(16)]]


@dataclass
class Mutator:
    """Makes batches of frames from valid ones, the same for the same seed. ``clean``: leading bytes that are never touched."""

    valid: Sequence[SubmissionFrame]
    arena: range
    seed: int
    clean: int = 8
    _made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._pool = np.stack([np.frombuffer(bytes(frame), dtype=np.uint8) for frame in self.valid])
        places = np.array([place for place in _places() if place[0] >= self.clean])
        self._offsets, self._widths = places[:, 0], places[:, 1]
        self._nasty = np.array(nasty_values(self.arena), dtype=np.uint64)

    def batch(self, count: int) -> Bytes:
        """So many frames, each with a call id of its own before it is mutated."""
        random = self._random
        frames: Bytes = self._pool[random.integers(len(self._pool), size=count)]
        frames[:, 8:16] = np.arange(self._made, self._made + count, dtype=np.uint64).view(np.uint8).reshape(count, 8)
        self._made += count
        how = random.random(count)
        times = np.where(how < WHOLE_SHARE, 0, random.choice(MUTATIONS, size=count))
        for number in range(max(MUTATIONS)):
            self._mutate(frames, np.flatnonzero(times > number))
        for row in np.flatnonzero(how > 1 - WILD_SHARE):
            frames[row, self.clean :] = random.integers(256, size=layout.SUBMISSION_SLOT_BYTES - self.clean, dtype=np.uint8)
        return frames

    def _mutate(self, frames: Bytes, rows: np.ndarray) -> None:  # type: ignore[type-arg]
        """One field of each of ``rows`` anew: nasty, random of any size, or a place in the arena."""
        random = self._random
        count = len(rows)
        chosen = random.integers(len(self._offsets), size=count)
        wild = random.integers(1 << 64, size=count, dtype=np.uint64) >> random.integers(64, size=count, dtype=np.uint64)
        inside = random.integers(self.arena.start, self.arena.stop, size=count, dtype=np.uint64)
        values = np.choose(random.integers(4, size=count), (random.choice(self._nasty, size=count), wild, inside, inside & np.uint64(0xFF)))
        for width in WIDTHS:
            of_width = np.flatnonzero(self._widths[chosen] == width)
            at = self._offsets[chosen[of_width], None] + np.arange(width)
            frames[rows[of_width, None], at] = values[of_width].astype(f"<u{width}").view(np.uint8).reshape(-1, width)
