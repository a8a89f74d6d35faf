"""``shmbroker config``: the settings as they are now, each with its origin."""

from __future__ import annotations

import json
import logging

import click
import msgspec

from shmbroker import console
from shmbroker.commands.options import json_option
from shmbroker.settings.load import Loaded, load, variable_of
from shmbroker.settings.schema import OWN_DEFAULTS


@click.command()
@json_option()
@click.pass_context
def config(context: click.Context, as_json: bool) -> None:
    """Print every setting with its value and where that came from."""
    loaded = _with_flags(context, load())
    values = msgspec.to_builtins(loaded.settings)
    if as_json:
        settings = {name: {"value": value, "from": loaded.origins[name]} for name, value in values.items()}
        click.echo(
            json.dumps({"files": [str(path) for path in loaded.files], "settings": settings, "own_defaults": OWN_DEFAULTS}, indent=2)
        )
        return
    from rich.table import Table

    table = Table("setting", "value", "from", "variable", box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(name, _text(value), loaded.origins[name], variable_of(name))
    terminal = console.terminal()
    terminal.print(table)
    for command, own in OWN_DEFAULTS.items():
        told = ", ".join(f"{name} {value}" for name, value in own.items())
        terminal.print(f"where not set, {command} takes: {told}", highlight=False, soft_wrap=True)


def _with_flags(context: click.Context, loaded: Loaded) -> Loaded:
    """With the flags of the program itself, before the command's name or after it."""
    above = context.parent
    assert above is not None
    by_flag = [one for one in (above, context) if one.get_parameter_source("log_level") is click.core.ParameterSource.COMMANDLINE]
    if not by_flag:
        return loaded
    level = logging.getLevelName(logging.getLogger().level).lower()  # as the last of them has set it
    settings = msgspec.structs.replace(loaded.settings, log_level=level)
    return Loaded(settings, {**loaded.origins, "log_level": "flag --log-level"}, loaded.files)


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value) or "-"
