"""Tables that fit a terminal, and showing them again and again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def table_of(*titles: str, figures: Collection[str] = (), whole: Collection[str] = ()) -> Table:
    """A table without rows. ``figures`` are on the right, in one piece as what is ``whole``; what does not fit elsewhere is folded, never cut."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in titles:
        figure = title in figures
        table.add_column(title, justify="right" if figure else "left", no_wrap=figure or title in whole, overflow="fold")
    return table


def show_pictures(first: RenderableType, another: Callable[[], RenderableType], interval: float) -> None:
    """Show ``first``, then ``another`` every ``interval`` seconds, until q or Ctrl-C: in place on a terminal, one below the other elsewhere."""
    from shmbroker.console import terminal

    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty():
            _in_place(first, another, interval)
            return
        picture = first
        while True:
            terminal().print(picture)
            time.sleep(interval)
            picture = another()


def _in_place(first: RenderableType, another: Callable[[], RenderableType], interval: float) -> None:
    from rich.live import Live

    from shmbroker.commands.keyboard import keys

    with keys() as pressed, Live(first, screen=True, auto_refresh=False) as live:
        live.refresh()
        while pressed(interval) != "q":
            live.update(another(), refresh=True)
