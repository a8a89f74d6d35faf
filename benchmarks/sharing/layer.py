"""The products of a decoder layer, as a client binds and calls them."""

from __future__ import annotations

from collections.abc import Callable

import shmbroker
from shmbroker.client.channel import Channel

SERVICE = "layer"
HIDDEN = 1024
PRODUCTS = {"qkv": (1024, 1536), "o": (1024, 1024), "gate_up": (1024, 5632), "down": (2816, 1024)}
"""Name, inputs and outputs: a model of 0.5 billion parameters has some 24 such layers."""


def bind(channel: Channel, client: shmbroker.Client, rows: int) -> list[Callable[[], object]]:
    """A call of each product with so many rows, its input in shared memory."""
    calls: list[Callable[[], object]] = []
    for name, (width, _) in PRODUCTS.items():
        op = channel.bind("linear", module=name)
        x = client.empty((1, rows, width)).fill_(0.5)
        calls.append(lambda op=op, x=x: op(x))  # type: ignore[misc]
    return calls
