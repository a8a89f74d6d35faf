"""Single keys from a terminal, without waiting for a whole line."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

Pressed = Callable[[float], str]
"""Waits for a key, so many seconds at most; returns it, or nothing."""


@contextlib.contextmanager
def keys() -> Iterator[Pressed]:
    """Read keys for the length of a block. Where standard input is no terminal, none is ever pressed."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> str:
        readable, _, _ = select.select([fd], [], [], seconds)
        return os.read(fd, 1).decode("ascii", "ignore") if readable else ""

    tty.setcbreak(fd)
    try:
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> str:
    time.sleep(seconds)
    return ""
