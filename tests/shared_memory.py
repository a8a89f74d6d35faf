"""What a test sees of shared memory from outside: where an object's file lies, what is mapped and open, and what another user may do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmbroker.memory import names

NOBODY = 65534
"""The user id of the other user."""


def path_of(name: str) -> str:
    """The file of the segment ``name``."""
    return f"{names.SHM_DIR}{name}"


def is_mapped(name: str) -> bool:
    """Whether this process maps the segment ``name``."""
    return name.lstrip("/") in Path("/proc/self/maps").read_text()


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Another user for the length of a block."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
