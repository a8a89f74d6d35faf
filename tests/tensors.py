"""Tensors by their forms alone: strategies for whatever a frame can carry, and how far its elements reach."""

from __future__ import annotations

from hypothesis import strategies as st

from shmbroker.arena.spec import CODE_OF, TensorSpec, contiguous_strides
from shmbroker.memory import layout

Tensor = tuple[TensorSpec, tuple[int, ...]]
"""Spec and strides."""

dtypes = st.sampled_from(sorted(CODE_OF, key=str))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """0 to 8 dimensions, contiguous or with strides of any kind that torch has (also 0, also overlapping), within the arena."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=layout.MAX_DIMS)))
    spec = TensorSpec(shape, draw(dtypes))
    if draw(st.booleans()):
        return spec, contiguous_strides(shape)
    return spec, tuple(draw(st.integers(0, 500)) for _ in shape)


def reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last, found another way than the package does."""
    if 0 in shape:
        return 0
    return 1 + sum(stride * (size - 1) for size, stride in zip(shape, strides, strict=True))
