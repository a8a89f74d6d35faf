"""A worker's log where its program has set up none: on standard error, as the programs of shmbroker have it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from shmbroker.systemd import journal

_OURS = "shmbroker"
"""The logger above all of the package's."""


@contextlib.contextmanager
def told_on_stderr(level: str) -> Iterator[None]:
    """A block in which the package's log goes to standard error, from ``level`` on. Who has set up logging, before or meanwhile, has it as set up."""
    ours = logging.getLogger(_OURS)
    if ours.hasHandlers():
        yield
        return
    handler = journal.handler()
    handler.addFilter(lambda record: not logging.root.handlers)
    before = ours.level
    ours.addHandler(handler)
    if before == logging.NOTSET:
        ours.setLevel(level.upper())
    try:
        yield
    finally:
        ours.setLevel(before)
        ours.removeHandler(handler)
