"""``shmbroker status``: what the broker knows, as tables or JSON."""

from __future__ import annotations

import json
from typing import Any

import click
import msgspec

from shmbroker.commands.options import instance_option, json_option
from shmbroker.console import terminal
from shmbroker.control import messages as m
from shmbroker.control.outdated import in_words
from shmbroker.settings.sizes import mib


@click.command()
@instance_option()
@json_option()
def status(instance: str | None, as_json: bool) -> None:
    """List workers, services, segments and channels."""
    from shmbroker.control.status import ask

    report = ask(instance)
    if as_json:
        click.echo(json.dumps(as_dict(report), indent=2))
    else:
        show(report)


def as_dict(report: m.StatusReport) -> dict[str, Any]:
    """For JSON: broker, workers, services, clients with segment, arena and channels."""
    peers = [msgspec.to_builtins(peer) for peer in report.peers]
    services: dict[str, list[str]] = {}
    for peer in report.peers:
        for service in peer.services:
            services.setdefault(service, []).append(peer.peer)
    broker = {
        "instance": report.instance,
        "endpoint": report.endpoint,
        "pid": report.pid,
        "version": report.version,
        "uptime_seconds": report.uptime_seconds,
        "shm_free_bytes": report.shm_free_bytes,
    }
    return {
        "broker": broker,
        "services": services,
        "workers": [peer for peer in peers if peer["role"] == "worker"],
        "clients": [peer for peer in peers if peer["role"] == "client"],
        "outdated": msgspec.to_builtins(report.outdated),
    }


def show(report: m.StatusReport) -> None:
    """Print tables."""
    from rich.markup import escape
    from rich.table import Table

    console = terminal()
    console.print(
        f"[bold]instance {report.instance}[/]: broker pid {report.pid}, version {report.version}, up {report.uptime_seconds:.0f} s, "
        f"{report.endpoint}, {mib(report.shm_free_bytes)} of shared memory free",
        soft_wrap=True,
    )
    workers = [peer for peer in report.peers if peer.role == "worker"]
    clients = [peer for peer in report.peers if peer.role == "client"]
    table = Table("worker", "pid", "services", "device", "calls", "errors", "up", box=None, pad_edge=False)
    for peer in workers:
        stats = peer.stats
        row = (peer.name, str(peer.pid), ", ".join(peer.services), peer.device, str(stats.calls), str(stats.errors))
        table.add_row(*row, f"{peer.age_seconds:.0f} s")
    console.print(table if workers else "no workers")
    for outdated in report.outdated:
        console.print(f"[yellow]{escape(in_words(outdated))}[/]", soft_wrap=True, highlight=False)
    segments = Table("client", "pid", "segment", "size", "held", "blocks", "largest free", box=None, pad_edge=False)
    channels = Table("channel of", "service", "worker", "lane", "doorbell", "control", "calls", "out", "back", box=None, pad_edge=False)
    names = {peer.peer: peer.name for peer in report.peers}
    for peer in clients:
        arena = peer.stats.arena
        held = ("?", "?", "?") if arena is None else (mib(arena.held_bytes), str(arena.blocks), mib(arena.largest_free_bytes))
        segments.add_row(peer.name, str(peer.pid), peer.segment, mib(peer.segment_bytes), *held)
        for channel in peer.stats.channels:
            channels.add_row(
                peer.name,
                channel.service,
                names.get(channel.worker, channel.worker),
                channel.lane,
                channel.doorbell,
                channel.control,
                str(channel.calls),
                mib(channel.sent_bytes),
                mib(channel.received_bytes),
            )
    console.print(segments if clients else "no clients")
    if any(peer.stats.channels for peer in clients):
        console.print(channels)
