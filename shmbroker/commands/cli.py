"""The ``shmbroker`` command: the group of all subcommands."""

from __future__ import annotations

import signal

import click

from shmbroker import console
from shmbroker.commands.config import config
from shmbroker.commands.demo import demo
from shmbroker.commands.doctor.command import doctor
from shmbroker.commands.gc import gc
from shmbroker.commands.keys import keys
from shmbroker.commands.map import map_command
from shmbroker.commands.ops import ops
from shmbroker.commands.ping import ping
from shmbroker.commands.serve import serve
from shmbroker.commands.status import status
from shmbroker.commands.top import top_command
from shmbroker.commands.trace import trace
from shmbroker.commands.units import units
from shmbroker.settings.schema import DEFAULTS
from shmbroker.version import __version__


@click.group(cls=console.Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default=DEFAULTS.log_level, show_default=True)
def cli(log_level: str) -> None:
    """Hand tensors between processes through shared memory."""
    console.set_up_logging(log_level)


for command in (serve, status, top_command, map_command, ops, ping, doctor, config, gc, keys, units, trace, demo):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    console.run(cli)


if __name__ == "__main__":
    main()
