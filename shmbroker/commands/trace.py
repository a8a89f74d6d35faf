"""``shmbroker trace``: putting trace files together."""

from __future__ import annotations

import click


@click.group()
def trace() -> None:
    """Work with trace files (--trace)."""


@trace.command()
@click.argument("out", metavar="OUT")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
def merge(out: str, files: tuple[str, ...]) -> None:
    """Write the traces of several processes into one file, for ui.perfetto.dev."""
    from shmbroker.trace.reader import merge as merge_files

    events = merge_files(out, files)
    click.echo(f"{events} events of {len(files)} files in {out}: open it at https://ui.perfetto.dev")
