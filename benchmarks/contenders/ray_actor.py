"""Ray: ``ray.put`` and an actor's method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray
import torch

from benchmarks.measure import Call


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[Call]:
    """One tensor there and one back."""
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")

    @ray.remote
    class Echo:
        """Answers with a tensor of its own."""

        def echo(self, tensor: torch.Tensor) -> torch.Tensor:
            """Of the same size."""
            return torch.zeros_like(tensor)

    try:
        actor = Echo.remote()  # type: ignore[attr-defined]
        tensor = torch.ones(nbytes, dtype=torch.uint8)
        yield Call(lambda: ray.get(actor.echo.remote(ray.put(tensor))))
    finally:
        ray.shutdown()
