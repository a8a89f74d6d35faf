"""The products of some decoder layers of the size of Llama-3.2-1B's, by name."""

from __future__ import annotations

from collections.abc import Iterator

SERVICE = "layers"
PRODUCTS = {"qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 16384), "down": (8192, 2048)}
"""Name, inputs and outputs."""


def names(layers: int) -> Iterator[tuple[str, str]]:
    """Of each product its name and kind, in the order in which a token needs them."""
    for layer in range(layers):
        for product in PRODUCTS:
            yield f"{layer}.{product}", product
