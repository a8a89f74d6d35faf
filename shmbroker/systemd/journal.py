"""Lines of a log on standard error: with the time for whoever reads it there, with a priority for journald, which has a clock of its own."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO

STREAM_VARIABLE = "JOURNAL_STREAM"

TEMPLATE = "%(levelname)s %(name)s: %(message)s"
JOURNAL_TEMPLATE = "%(name)s: %(message)s"

AT_ONCE = 10
"""Lines of one kind that are told in each :data:`PERIOD_SECONDS`: the errors of a client that goes on trying say nothing new, and fill a disk."""

PERIOD_SECONDS = 10.0

_KINDS_KNOWN = 1024
"""Kinds of lines that are counted; beyond that the counts start over."""

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""By level, the priority of syslog(3) that sd-daemon(3) has before a line."""

_DEBUG_PRIORITY = 7


def is_journal(stream: TextIO) -> bool:
    """Whether ``stream`` goes to journald: by device and inode, as systemd.exec(5) asks for, since a child may have it somewhere else."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get(STREAM_VARIABLE) == f"{found.st_dev}:{found.st_ino}"


def line(level: int, text: str) -> str:
    """``text`` as standard error is to have it: for journald each of its lines with the priority of ``level``."""
    if not is_journal(sys.stderr):
        return text
    priority = next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG_PRIORITY)
    return "\n".join([f"<{priority}>{one}" for one in text.split("\n")])


class _ForJournal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return line(record.levelno, super().format(record))


class Repeats(logging.Filter):
    """Lets :data:`AT_ONCE` lines of a kind pass in each :data:`PERIOD_SECONDS`, then says how many it has kept back. Of one kind are lines of one template."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[object, tuple[float, int]] = {}
        """By kind: when its period began, and the lines since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is told."""
        kind = record.name, record.levelno, str(record.msg)
        now = time.monotonic()
        begun, count = self._counts.get(kind, (now, 0))
        if now - begun >= PERIOD_SECONDS:
            kept_back = count - AT_ONCE
            begun, count = now, 0
            if kept_back > 0:
                record.msg = f"{record.msg} ({kept_back} more like this were not told)"
        if len(self._counts) >= _KINDS_KNOWN:
            self._counts.clear()
        self._counts[kind] = begun, count + 1
        return count < AT_ONCE


def handler() -> logging.Handler:
    """For standard error, as it is now."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(_ForJournal(JOURNAL_TEMPLATE) if is_journal(sys.stderr) else logging.Formatter(f"%(asctime)s {TEMPLATE}"))
    made.addFilter(Repeats())
    return made
