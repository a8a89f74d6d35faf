"""``shmbroker ops``: what the worker of a service can be asked for."""

from __future__ import annotations

import json

import click

from shmbroker.commands.options import instance_option, json_option, service_argument


@click.command()
@service_argument
@instance_option()
@json_option()
def ops(service: str, instance: str | None, as_json: bool) -> None:
    """List the ops that can be bound on a channel to SERVICE: those of its worker, and those that every worker has.

    Where several workers offer it, they are those of the one with the fewest channels; the others are named.
    """
    from shmbroker.client.client import connect
    from shmbroker.control.status import ask
    from shmbroker.worker.built_in_ops import BUILT_IN_OPS

    with connect(instance, arena="1M", name="shmbroker-ops", channels=1, depth=4) as client:
        channel = client.channel(service, wait=0.0)
        others = [peer for peer in ask(client.instance).peers if service in peer.services and peer.peer != channel.worker_id]
    if as_json:
        worker = {"name": channel.worker_name, "id": channel.worker_id, "pid": channel.worker_pid, "device": channel.device}
        told = {"service": service, "worker": worker, "ops": list(channel.ops), "built_in": list(BUILT_IN_OPS)}
        click.echo(json.dumps(told | {"others": [peer.peer for peer in others]}, indent=2))
        return
    click.echo(f"{service!r}: worker {channel.worker_name} (pid {channel.worker_pid}) on {channel.device}")
    for op in (*channel.ops, *BUILT_IN_OPS):
        click.echo(f"  {op}")
    for peer in others:
        click.echo(f"also offered by {peer.name} (pid {peer.pid})")
