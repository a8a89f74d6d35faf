"""``shmbroker keys``: keys for control over TCP."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--make", "folder", required=True, metavar="DIR", type=click.Path(path_type=Path), help="A folder to make, or an empty one.")
def keys(folder: Path) -> None:
    """Make the keys for control over TCP. Who has the folder, or a copy, is a member."""
    from shmbroker.control.access import KEYS_VARIABLE
    from shmbroker.control.keys import make_keys

    make_keys(folder)
    click.echo(
        f"made {folder}: give it to 'shmbroker serve --control tcp://127.0.0.1:PORT --keys {folder}', and to all who take part as {KEYS_VARIABLE}"
    )
