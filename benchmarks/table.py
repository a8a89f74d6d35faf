"""Tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable


class Table:
    """A titled table whose first column is left-aligned, the others right."""

    def __init__(self, title: str, columns: list[str]) -> None:
        self._table = RichTable(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
        for index, column in enumerate(columns):
            self._table.add_column(column, justify="right" if index else "left")

    def row(self, *cells: str) -> None:
        """One more row."""
        self._table.add_row(*cells)

    def show(self) -> None:
        """Print it."""
        console = Console()
        console.print(self._table)
        console.print()


def size_text(nbytes: int) -> str:
    """``8 MiB``."""
    for unit, power in (("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return f"{nbytes >> power} {unit}"
    return f"{nbytes} B"
