"""The program that runs a Hugging Face model whose heavy modules live in a GPU worker. Imports :mod:`shmbroker`, never :mod:`gpu_worker`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tee_worker.offloading.offload import Offloaded, offload
    from tee_worker.planning.splits import Split, Splits

__all__ = ["Offloaded", "Split", "Splits", "offload"]

# The command line sets variables that torch reads when it is loaded, so nothing here may load it early.
_HOME = {
    "Offloaded": "tee_worker.offloading.offload",
    "offload": "tee_worker.offloading.offload",
    "Split": "tee_worker.planning.splits",
    "Splits": "tee_worker.planning.splits",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tee_worker' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
