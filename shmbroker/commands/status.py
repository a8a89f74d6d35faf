"""``shmbroker status``: what the broker knows, as tables or JSON."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from shmbroker.commands.options import instance_option, json_option
from shmbroker.commands.picture import show_pictures, table_of
from shmbroker.console import terminal
from shmbroker.control import messages as m
from shmbroker.control.outdated import in_words
from shmbroker.errors import BrokerUnreachable
from shmbroker.settings.sizes import MIB, mib

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command()
@instance_option()
@click.option("--watch", is_flag=True, help="Look again and again; q or Ctrl-C ends it.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Of --watch: seconds between two looks.")
@json_option("For programs; with --watch a line for each look.")
def status(instance: str | None, watch: bool, interval: float, as_json: bool) -> None:
    """List workers, services, segments and channels."""
    from shmbroker.control.status import ask

    report = ask(instance)
    if not watch:
        if as_json:
            click.echo(json.dumps(as_dict(report), indent=2))
        else:
            terminal().print(render(report))
        return
    if as_json:
        _watch_for_programs(instance, report, interval)
        return
    show_pictures(render(report), lambda: _picture(instance), interval)


def _picture(instance: str | None) -> RenderableType:
    """The tables, or why there are none: a broker may be started again while it is watched."""
    from rich.text import Text

    from shmbroker.control.status import ask

    try:
        return render(ask(instance))
    except BrokerUnreachable as error:
        return Text(str(error))


def _watch_for_programs(instance: str | None, report: m.StatusReport, interval: float) -> None:
    from shmbroker.control.status import ask

    with contextlib.suppress(KeyboardInterrupt):
        while True:
            click.echo(json.dumps(as_dict(report)))
            time.sleep(interval)
            report = ask(instance)


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


def render(report: m.StatusReport) -> RenderableType:
    """As tables for a terminal of 80 columns; names that are too long for it are folded, figures never."""
    from rich.console import Group
    from rich.text import Text

    workers = [peer for peer in report.peers if peer.role == "worker"]
    clients = [peer for peer in report.peers if peer.role == "client"]
    parts: list[RenderableType] = [
        Text.assemble(
            (f"instance {report.instance}", "bold"),
            f": broker pid {report.pid}, version {report.version}, up {report.uptime_seconds:.0f} s",
        ),
        Text(report.endpoint, overflow="fold"),
        Text(f"{mib(report.shm_free_bytes)} of shared memory free"),
        Text(),
    ]
    if workers:
        table = table_of("worker", "pid", "services", "device", "calls", "errors", "up s", figures=("pid", "calls", "errors", "up s"))
        for peer in workers:
            stats = peer.stats
            who = (peer.name, str(peer.pid), ", ".join(peer.services), peer.device)
            table.add_row(*map(Text, who), str(stats.calls), str(stats.errors), f"{peer.age_seconds:.0f}")
        parts.append(table)
    else:
        parts.append(Text("no workers"))
    parts += [Text(in_words(outdated), style="yellow") for outdated in report.outdated]
    parts.append(Text())
    if not clients:
        parts.append(Text("no clients"))
        return Group(*parts)
    names = {peer.peer: peer.name for peer in report.peers}
    arenas = table_of("client", "pid", "size", "held", "blocks", "largest free", figures=("pid", "size", "held", "blocks", "largest free"))
    segments = table_of("segment", "of", whole=("segment",))
    channels = table_of(
        "channel of", "service", "worker", "lane", "doorbell", "control", "calls", "MiB out", "back", figures=("calls", "MiB out", "back")
    )
    trust: list[RenderableType] = []
    for peer in clients:
        arena = peer.stats.arena
        held = ("?", "?", "?") if arena is None else (mib(arena.held_bytes), str(arena.blocks), mib(arena.largest_free_bytes))
        arenas.add_row(Text(peer.name), str(peer.pid), mib(peer.segment_bytes), *held)
        segments.add_row(Text(peer.segment), Text(peer.name))
        for channel in peer.stats.channels:
            channels.add_row(
                *map(Text, (peer.name, channel.service, names.get(channel.worker, channel.worker))),
                *map(Text, (channel.lane, channel.doorbell, channel.control)),
                str(channel.calls),
                f"{channel.sent_bytes / MIB:.1f}",
                f"{channel.received_bytes / MIB:.1f}",
            )
            if channel.trust:
                trust.append(Text(f"trust of {peer.name} in {channel.service}: {channel.trust}"))
    parts += [arenas, Text(), segments]
    if any(peer.stats.channels for peer in clients):
        parts += [Text(), channels]
    if trust:
        parts += [Text(), *trust]
    return Group(*parts)
