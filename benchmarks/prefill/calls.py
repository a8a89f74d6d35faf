"""The prototype's prefill as calls: Llama-3.2-1B, 1024 tokens, float32, 98 calls, 3328 MiB out and 3656.5 MiB back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shmbroker import TensorSpec

LAYERS, TOKENS, HIDDEN, HEADS, HEAD, INTERMEDIATE, KEYS, VOCABULARY = 16, 1024, 2048, 32, 64, 8192, 512, 128256


@dataclass(frozen=True, slots=True)
class Shape:
    """One call's tensors, float32 (token ids: int64)."""

    name: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


def calls(scale: int = 1) -> list[Shape]:
    """The 98 calls in order; ``scale`` divides tokens and vocabulary for a quick run."""
    t = TOKENS // scale
    vocabulary = VOCABULARY // scale
    layer = [
        Shape("q, k, v", ((1, t, HIDDEN),), ((1, t, HIDDEN), (1, t, KEYS), (1, t, KEYS))),
        Shape("Q @ K^T", ((1, HEADS, t, HEAD), (1, HEADS, HEAD, t)), ((1, HEADS, t, t),)),
        Shape("attention @ V", ((1, HEADS, t, t), (1, HEADS, t, HEAD)), ((1, HEADS, t, HEAD),)),
        Shape("o", ((1, t, HIDDEN),), ((1, t, HIDDEN),)),
        Shape("gate, up", ((1, t, HIDDEN),), ((1, t, INTERMEDIATE), (1, t, INTERMEDIATE))),
        Shape("down", ((1, t, INTERMEDIATE),), ((1, t, HIDDEN),)),
    ]
    return [
        Shape("embed", ((1, t * 2),), ((1, t, HIDDEN),)),  # int64 ids: two float32 each
        *layer * LAYERS,
        Shape("lm_head", ((1, 1, HIDDEN),), ((1, 1, vocabulary),)),
    ]


def nbytes(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Of float32 tensors."""
    return sum(TensorSpec(shape, torch.float32).nbytes for shape in shapes)


def transposed(shape: Shape) -> bool:
    """Whether the second input is a transposed view, as K^T is."""
    return shape.name == "Q @ K^T"
