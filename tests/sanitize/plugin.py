"""A plugin of pytest that ends the run unless the compiled parts in this very process are the sanitized ones."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

MODULES = ("shmbroker.lane._ends", "shmbroker.arena._leases", "shmbroker.trust._loops")
MARKS = (b"__asan_report_store8", b"__asan_report_load8", b"__ubsan_handle")
"""Names that a module refers to only where its loads, stores and arithmetic are checked."""

TREE = Path(__file__).parents[2]


def loaded() -> list[Path]:
    """The files that the compiled parts were loaded from, each of them seen to be sanitized and in use. Raises pytest.UsageError for any other."""
    from shmbroker.arena import leases
    from shmbroker.lane import ends
    from shmbroker.memory import compiled

    files = [Path(str(importlib.import_module(name).__file__)) for name in MODULES]
    maps = Path("/proc/self/maps").read_text()
    for file in files:
        missing = [mark.decode() for mark in MARKS if mark not in file.read_bytes()]
        if not file.is_relative_to(TREE) or str(file) not in maps or missing:
            raise pytest.UsageError(f"{file} is not the sanitized build of {TREE}; without {missing}")
    if "libasan" not in maps:
        raise pytest.UsageError("the sanitizer's library is not loaded")
    if not (compiled.WANTED and ends.COMPILED and Path(leases.__file__).is_relative_to(TREE)):
        raise pytest.UsageError("the compiled parts are not those that are used")
    return files


def pytest_configure() -> None:
    for file in loaded():
        print(f"sanitized: {file}")
