"""The ``shmbroker`` command: broker daemon, status, reaper, demo."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import signal
import sys
from pathlib import Path

import click

from shmbroker import console
from shmbroker.broker.limits import Limits
from shmbroker.commands import trace
from shmbroker.commands.config import config
from shmbroker.commands.doctor.command import doctor
from shmbroker.errors import BadInput
from shmbroker.settings.schema import DEFAULTS
from shmbroker.systemd.units import units
from shmbroker.version import __version__

MAX_GROUP_ID = (1 << 32) - 2
"""All ones means "leave it as it is" to chown(2)."""

_instance_option = click.option(
    "--instance", metavar="NAME", help="Which broker; one machine may run several. Default: $SHMBROKER_INSTANCE, else 'default'."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default=DEFAULTS.log_level, show_default=True)
def cli(log_level: str) -> None:
    """Hand tensors between processes through shared memory."""
    console.set_up_logging(log_level)


@cli.command()
@_instance_option
@click.option(
    "--group", metavar="NAME", help="Let this group, by name or number, share memory and sockets (0660). Default: this user alone."
)
@click.option("--control", metavar="ADDRESS", help="tcp://127.0.0.1:PORT instead of unix sockets. Default: $SHMBROKER_CONTROL.")
@click.option("--keys", metavar="DIR", help="Of 'shmbroker keys --make', for control over TCP. Default: $SHMBROKER_KEYS.")
@click.option("--max-bytes", metavar="SIZE", help="Shared memory that one process may have made, e.g. 2G. Default: no quota.")
@click.option(
    "--max-clients", type=click.IntRange(1), default=DEFAULTS.max_clients, show_default=True, help="Clients that have a segment at a time."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Serve Prometheus' /metrics, and /healthz, on 127.0.0.1; 0: any free port. Default: off.",
)
@click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does.")
def serve(
    instance: str | None,
    group: str | None,
    control: str | None,
    keys: str | None,
    max_bytes: str | None,
    max_clients: int,
    metrics_port: int | None,
    until_exit: int,
) -> None:
    """Run the broker: make segments, introduce peers, watch processes, reap what the dead leave behind."""
    from shmbroker.broker.broker import Broker
    from shmbroker.client.local_broker import READY_LINE
    from shmbroker.control.joining import resolve_instance
    from shmbroker.settings.sizes import parse_bytes

    def ready() -> None:
        print(READY_LINE, flush=True)

    limits = Limits(parse_bytes(max_bytes) if max_bytes else 0, max_clients)
    broker = Broker(resolve_instance(instance), _group_id(group), until_exit, control=control, keys=keys, limits=limits)
    with contextlib.ExitStack() as stack:
        if metrics_port is not None:
            from shmbroker.monitoring.metrics_server import serving_metrics

            stack.enter_context(serving_metrics(broker, metrics_port))
        broker.serve(ready)


def _group_id(group: str | None) -> int:
    if not group:
        return -1
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        if group.isdecimal() and int(group) <= MAX_GROUP_ID:
            return int(group)
        raise BadInput(f"there is no group {group!r}: make it with 'groupadd {group}'") from None


@cli.command()
@click.option("--make", "folder", required=True, metavar="DIR", type=click.Path(path_type=Path), help="A folder to make, or an empty one.")
def keys(folder: Path) -> None:
    """Make the keys for control over TCP. Who has the folder, or a copy, is a member."""
    from shmbroker.control.access import KEYS_VARIABLE
    from shmbroker.control.keys import make_keys

    make_keys(folder)
    click.echo(
        f"made {folder}: give it to 'shmbroker serve --control tcp://127.0.0.1:PORT --keys {folder}', and to all who take part as {KEYS_VARIABLE}"
    )


@cli.command()
@_instance_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(instance: str | None, as_json: bool) -> None:
    """List workers, services, segments and channels."""
    from shmbroker.commands import status as status_module
    from shmbroker.control.status import ask

    report = ask(instance)
    if as_json:
        click.echo(json.dumps(status_module.as_dict(report), indent=2))
    else:
        status_module.show(report)


@cli.command()
@_instance_option
@click.option("--all", "everything", is_flag=True, help="Of all instances.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
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


@cli.command()
@click.option("--prompt", default="Why is the sky blue?", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--split", "splits", multiple=True, help="linear, fused or op; may be given several times.  [default: all three]")
@click.option("--lane", "lanes", multiple=True, help="shm or zmq; may be given several times.  [default: both]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def demo(prompt: str, max_new_tokens: int, splits: tuple[str, ...], lanes: tuple[str, ...], as_json: bool) -> None:
    """Generate text with a small model split over real processes, and compare it with the model in one process."""
    # The demo drives the two programs above this package, as their user would: by their command lines.
    from shmbroker.commands.demo import run

    sys.exit(0 if run(prompt, max_new_tokens, splits, lanes, as_json) else 1)


cli.add_command(units)
cli.add_command(trace.trace)
cli.add_command(config)
cli.add_command(doctor)


def _attach_looking() -> None:
    """The commands that only look, each in a module of its own."""
    from shmbroker.commands.map import map_command
    from shmbroker.commands.top import top_command

    cli.add_command(map_command)
    cli.add_command(top_command)


_attach_looking()


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL) if os.name == "posix" else None
    console.run(cli)


if __name__ == "__main__":
    main()
