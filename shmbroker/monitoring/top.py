"""The picture that ``shmbroker top`` shows, made of two looks at an instance a moment apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shmbroker.monitoring.figures import ChannelFigures, quantile_ns
from shmbroker.monitoring.observation import Observation, ObservedClient
from shmbroker.monitoring.process_times import cpu_seconds
from shmbroker.monitoring.ring_picture import draw_ring
from shmbroker.settings.sizes import mib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

OLDEST_SHOWN = 3
RING_WIDTH = 64


class Look(msgspec.Struct, frozen=True):
    """An instance at a moment, with the CPU time that its processes had used by then."""

    seen: Observation
    cpu: dict[int, float | None]

    @classmethod
    def of(cls, seen: Observation) -> Look:
        """Look at the processes too."""
        pids = {seen.status.pid, *[peer.pid for peer in seen.status.peers]}
        return cls(seen, {pid: cpu_seconds(pid) for pid in pids})


class WorkerLine(msgspec.Struct, frozen=True):
    """A worker."""

    name: str
    pid: int
    services: tuple[str, ...]
    device: str
    calls: int
    errors: int
    cpu_percent: float | None
    """Of one core; None when its process cannot be seen from here."""


class BlockLine(msgspec.Struct, frozen=True):
    """A block that is held."""

    offset: int
    nbytes: int
    age_seconds: float


class ClientLine(msgspec.Struct, frozen=True):
    """A client and its arena, sizes in bytes. ``why`` tells why there are no figures."""

    name: str
    id: str
    pid: int
    cpu_percent: float | None
    segment: str
    why: str = ""
    arena_bytes: int = 0
    held_bytes: int = 0
    held_blocks: int = 0
    high_water_bytes: int = 0
    waits: int = 0
    idle_seconds: float = 0.0
    """Since it last told of a change of its arena."""
    ring: tuple[str, str] = ("", "")
    oldest: tuple[BlockLine, ...] = ()


class ChannelLine(msgspec.Struct, frozen=True):
    """A channel. Rates and percentiles are of the time between the two looks; percentiles are estimates, right within a factor of 1.41."""

    client: str
    client_id: str
    channel: int
    worker: str
    service: str
    lane: str
    doorbell: str
    calls: int
    errors: int
    outstanding: int
    waiting: int
    """Of them, those that the worker has not begun."""
    share_percent: float
    """Of the worker's time in the last second, what this client had."""
    idle_seconds: float
    """Since either side last told of a change: of a call, most often."""
    sent_bytes: int
    received_bytes: int
    calls_per_second: float
    sent_bytes_per_second: float
    received_bytes_per_second: float
    p50_us: float
    p99_us: float


class Top(msgspec.Struct, frozen=True):
    """All that ``shmbroker top`` shows."""

    instance: str
    seconds: float
    """Between the two looks."""
    shm_free_bytes: int
    broker_cpu_percent: float | None
    workers: tuple[WorkerLine, ...]
    clients: tuple[ClientLine, ...]
    channels: tuple[ChannelLine, ...]

    @classmethod
    def between(cls, before: Look, now: Look) -> Top:
        """From two looks at one instance."""
        seen = now.seen
        seconds = max(1e-3, seen.seconds - before.seen.seconds)

        def cpu(pid: int) -> float | None:
            used, had = now.cpu.get(pid), before.cpu.get(pid)
            return None if used is None or had is None else round(max(0.0, used - had) / seconds * 100, 1)

        earlier = {
            (client.peer.peer, one.index, one.opened_ns): one
            for client in before.seen.clients
            if client.figures is not None
            for one in client.figures.channels
        }
        return cls(
            instance=seen.status.instance,
            seconds=seconds,
            shm_free_bytes=seen.status.shm_free_bytes,
            broker_cpu_percent=cpu(seen.status.pid),
            workers=tuple(
                WorkerLine(peer.name, peer.pid, peer.services, peer.device, peer.stats.calls, peer.stats.errors, cpu(peer.pid))
                for peer in seen.workers
            ),
            clients=tuple(_client_line(client, cpu(client.peer.pid)) for client in seen.clients),
            channels=tuple(
                _channel_line(seen, client, one, earlier.get((client.peer.peer, one.index, one.opened_ns)), seconds)
                for client in seen.clients
                if client.figures is not None
                for one in client.figures.channels
            ),
        )

    def render(self) -> RenderableType:
        """As tables for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        broker = "" if self.broker_cpu_percent is None else f", broker {self.broker_cpu_percent:.1f} % CPU"
        head = f"instance {self.instance}{broker}, {mib(self.shm_free_bytes)} of shared memory free"
        workers, channels, rates = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
        _columns(workers, "worker", "services", "device", figures=("pid", "calls", "errors", "CPU %"))
        for worker in self.workers:
            figures = str(worker.pid), str(worker.calls), str(worker.errors), _percent(worker.cpu_percent)
            workers.add_row(Text(worker.name), Text(", ".join(worker.services)), Text(worker.device), *figures)
        _columns(channels, "channel of", "service", "worker", "lane", figures=("calls", "errors", "waiting", "share %"))
        _columns(rates, "channel of", "service", figures=("calls/s", "p50 us", "p99 us", "out MiB/s", "back MiB/s"))
        for one in self.channels:
            who = Text(one.client), Text(one.service)
            channels.add_row(
                *who,
                Text(one.worker),
                Text(f"{one.lane}/{one.doorbell}"),
                str(one.calls),
                str(one.errors),
                str(one.waiting),
                f"{one.share_percent:.0f}",
            )
            moved = f"{one.sent_bytes_per_second / 2**20:.1f}", f"{one.received_bytes_per_second / 2**20:.1f}"
            rates.add_row(*who, f"{one.calls_per_second:.0f}", f"{one.p50_us:.1f}", f"{one.p99_us:.1f}", *moved)
        parts: list[RenderableType] = [Text(head), Text()]
        parts.append(workers if self.workers else Text("no workers"))
        parts += [Text(), channels, Text(), rates] if self.channels else [Text(), Text("no channels")]
        for client in self.clients:
            parts += [Text(), Text("\n".join(_arena_lines(client)))]
        if not self.clients:
            parts += [Text(), Text("no clients")]
        return Group(*parts)


def _client_line(client: ObservedClient, cpu_percent: float | None) -> ClientLine:
    peer, figures = client.peer, client.figures
    if figures is None:
        return ClientLine(peer.name, peer.peer, peer.pid, cpu_percent, peer.segment, client.why)
    arena = figures.arena
    oldest = sorted(arena.blocks, key=lambda block: -block.age_seconds)[:OLDEST_SHOWN]
    return ClientLine(
        name=peer.name,
        id=peer.peer,
        pid=peer.pid,
        cpu_percent=cpu_percent,
        segment=peer.segment,
        arena_bytes=arena.total_bytes,
        held_bytes=arena.held_bytes,
        held_blocks=arena.held_blocks,
        high_water_bytes=arena.high_water_bytes,
        waits=arena.waits,
        idle_seconds=round(arena.idle_seconds, 3),
        ring=draw_ring(arena, figures.geometry.arena_offset, RING_WIDTH),
        oldest=tuple(BlockLine(block.offset, block.nbytes, round(block.age_seconds, 3)) for block in oldest),
    )


def _channel_line(
    seen: Observation, client: ObservedClient, one: ChannelFigures, before: ChannelFigures | None, seconds: float
) -> ChannelLine:
    def rate(now: int, then: int) -> float:
        # A counter that went back was reset.
        return (now - then if now >= then else now) / seconds if before is not None else 0.0

    earlier = before or one
    gone_by = [max(0, now - then) for now, then in zip(one.buckets, earlier.buckets, strict=True)]
    return ChannelLine(
        client=client.peer.name,
        client_id=client.peer.peer,
        channel=one.index,
        worker=seen.name_of(one.worker),
        service=one.service,
        lane=one.lane,
        doorbell=one.doorbell,
        calls=one.calls,
        errors=one.errors,
        outstanding=one.outstanding,
        waiting=one.waiting_calls,
        share_percent=round(one.share * 100, 1),
        idle_seconds=round(one.idle_seconds, 3),
        sent_bytes=one.sent_bytes,
        received_bytes=one.received_bytes,
        calls_per_second=rate(one.calls, earlier.calls),
        sent_bytes_per_second=rate(one.sent_bytes, earlier.sent_bytes),
        received_bytes_per_second=rate(one.received_bytes, earlier.received_bytes),
        p50_us=quantile_ns(gone_by, 0.5) / 1e3,
        p99_us=quantile_ns(gone_by, 0.99) / 1e3,
    )


def _columns(table: Table, *titles: str, figures: tuple[str, ...]) -> None:
    """Names first, folded where a terminal of 80 columns is too narrow for them; then ``figures``, never."""
    for title in titles:
        table.add_column(title, overflow="fold")
    for title in figures:
        table.add_column(title, justify="right", no_wrap=True)


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _arena_lines(client: ClientLine) -> list[str]:
    who = f"{client.name} (pid {client.pid}, {_percent(client.cpu_percent)} % CPU)"
    if client.why:
        return [f"{who}: {client.why}"]
    lines = [
        f"{who}: arena {mib(client.held_bytes)} of {mib(client.arena_bytes)} held",
        f"in {client.held_blocks} blocks, at most {mib(client.high_water_bytes)}, {client.waits} waits for room",
        *client.ring,
    ]
    lines += [f"oldest: {block.nbytes} bytes at {block.offset} for {block.age_seconds:.1f} s" for block in client.oldest]
    return lines
