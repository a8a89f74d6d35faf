"""What the tests of the examples share."""

from __future__ import annotations

from tests.peers import broker, worker

__all__ = ["broker", "worker"]
