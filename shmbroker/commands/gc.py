"""``shmbroker gc``: the reaper, by hand."""

from __future__ import annotations

import json

import click

from shmbroker.commands.options import instance_option, json_option


@click.command()
@instance_option()
@click.option("--all", "everything", is_flag=True, help="Of all instances.")
@json_option()
def gc(instance: str | None, everything: bool, as_json: bool) -> None:
    """Unlink what no living process holds in shared memory."""
    from shmbroker.control.joining import resolve_instance
    from shmbroker.memory.reaper import objects, reap
    from shmbroker.settings.sizes import mib

    which = None if everything else resolve_instance(instance)
    reaped = reap(which)
    left = list(objects(which))
    if as_json:
        rows = [{"name": one.name.file, "bytes": one.nbytes} for one in reaped]
        click.echo(json.dumps({"reaped": rows, "kept": [name.file for name in left]}, indent=2))
        return
    for one in reaped:
        click.echo(f"reaped {one.name.file}, {mib(one.nbytes)}")
    click.echo(f"{len(reaped)} reaped, {mib(sum(one.nbytes for one in reaped))} given back; {len(left)} in use")
