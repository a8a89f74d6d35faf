"""Benchmarks: ``python -m benchmarks [name ...]``. Every comparison pairs both sides in one run, alternating. Nothing here is asserted by tests."""

import os

# Before torch is imported: idle compute threads of this process must not spin against the peer's (docs/decisions.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
