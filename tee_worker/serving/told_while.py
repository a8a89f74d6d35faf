"""Telling that something goes on, and for how long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_PROGRESS_SECONDS = 10.0
"""Between two words of what takes long."""


@contextlib.contextmanager
def told_while(what: str, on_note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Tell ``what`` goes on, with the seconds so far, every few seconds until the block ends or what is yielded is called."""
    begun, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(_PROGRESS_SECONDS):
            on_note(f"{what} ({time.monotonic() - begun:.0f} s so far)")

    thread = threading.Thread(target=tell, name="shmbroker-progress", daemon=True)
    thread.start()
    try:
        yield over.set
    finally:
        over.set()
        thread.join()
