"""``shmbroker serve``: the broker daemon."""

from __future__ import annotations

import contextlib
import grp

import click

from shmbroker.commands.options import instance_option
from shmbroker.errors import BadInput
from shmbroker.settings.schema import DEFAULTS

METRICS_SOCKET = "metrics"
"""``FileDescriptorName=`` of what systemd listens on for us."""

MAX_GROUP_ID = (1 << 32) - 2
"""All ones means "leave it as it is" to chown(2)."""


@click.command()
@instance_option()
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
    help="Serve Prometheus' /metrics, and /healthz, on 127.0.0.1; 0: any free port. Default: off, but for a socket that systemd hands over.",
)
@click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does.")
@click.pass_context
def serve(
    context: click.Context,
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
    from shmbroker.broker.limits import Limits
    from shmbroker.client.local_broker import READY_LINE
    from shmbroker.control.joining import resolve_instance
    from shmbroker.memory.open_files import raise_file_limit
    from shmbroker.settings.sizes import parse_bytes
    from shmbroker.systemd.passed_sockets import passed

    def ready() -> None:
        print(READY_LINE, flush=True)

    limits = Limits(parse_bytes(max_bytes) if max_bytes else 0, max_clients)
    files = raise_file_limit()
    if (
        context.get_parameter_source("max_clients") is not click.core.ParameterSource.DEFAULT
    ):  # else it serves as many as there are files for
        limits.check_files(files)
    broker = Broker(resolve_instance(instance), _group_id(group), until_exit, control=control, keys=keys, limits=limits)
    with contextlib.ExitStack() as stack:
        listeners = passed(METRICS_SOCKET)
        if listeners or metrics_port is not None:
            from shmbroker.monitoring.metrics_server import listen, serving_metrics

            own = listen(metrics_port) if metrics_port is not None else None
            for listener in [*listeners, *([own] if own else [])]:
                stack.enter_context(serving_metrics(broker, listener))
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
