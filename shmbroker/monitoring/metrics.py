"""The instance as Prometheus metrics: made anew for each scrape, from the headers of the segments and the broker's own state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from shmbroker.control import messages as m
from shmbroker.memory import layout
from shmbroker.monitoring.figures import ArenaFigures, ChannelFigures, upper_bound_ns
from shmbroker.monitoring.observation import Observation, observe

MOST_CHANNELS = 64
"""In one scrape. A client may claim to have a thousand channels open, and the broker is a small daemon: with all of them told, its resident memory
grew to 43 MiB."""

MOST_OF_A_CLIENT = 16
"""Channels of one client in one scrape; what a segment has by default."""

_CHANNEL_LABELS = ("client", "client_id", "channel", "worker", "service", "lane")
_CLIENT_LABELS = ("client", "client_id")

_BOUNDS = [
    bucket for bucket in range(layout.BUCKETS - 1) if (bucket + layout.FIRST_BUCKET) % 2 == 0 and 2**10 <= upper_bound_ns(bucket) <= 2**36
]
"""The buckets that end at powers of two: 1.024 us to 69 s."""


class Watched(Protocol):
    """A broker, as far as it is looked at here."""

    @property
    def reaped_objects(self) -> int:
        """Objects in shared memory that nobody held any more, so far."""

    @property
    def reaped_bytes(self) -> int:
        """Their sizes."""

    def status(self) -> m.StatusReport:
        """All that it knows."""


class InstanceCollector(Collector):
    """Asked by ``prometheus_client`` at each scrape."""

    def __init__(self, broker: Watched) -> None:
        self._broker = broker

    def collect(self) -> Iterable[Metric]:
        """All metrics of the moment."""
        seen = observe(self._broker.status(), MOST_OF_A_CLIENT)
        yield from self._of_the_broker(seen)
        yield from _of_arenas(seen)
        yield from _of_channels(seen)

    def _of_the_broker(self, seen: Observation) -> Iterator[Metric]:
        status = seen.status
        info = InfoMetricFamily("shmbroker_broker", "The broker.")
        info.add_metric((), {"instance_name": status.instance, "version": status.version})
        yield info
        yield GaugeMetricFamily("shmbroker_uptime_seconds", "Since the broker was started.", status.uptime_seconds)
        peers = GaugeMetricFamily("shmbroker_peers", "Processes that the broker knows.", labels=("role",))
        for role in ("client", "worker"):
            peers.add_metric((role,), sum(peer.role == role for peer in status.peers))
        yield peers
        segments = [client.peer.segment_bytes for client in seen.clients if client.peer.segment]
        yield GaugeMetricFamily("shmbroker_segments", "Segments of the clients.", len(segments))
        yield GaugeMetricFamily("shmbroker_segments_bytes", "Their sizes in all.", sum(segments))
        unreadable = sum(client.figures is None for client in seen.clients)
        yield GaugeMetricFamily("shmbroker_segments_unreadable", "Segments whose headers cannot be read or are spoilt.", unreadable)
        yield GaugeMetricFamily("shmbroker_shm_free_bytes", "Free in /dev/shm.", status.shm_free_bytes)
        reaped = self._broker.reaped_objects, self._broker.reaped_bytes
        yield CounterMetricFamily("shmbroker_reaped_objects", "Objects in shared memory that nobody held any more.", reaped[0])
        yield CounterMetricFamily("shmbroker_reaped_bytes", "Their sizes.", reaped[1])
        open_channels = sum(client.figures.open_channels for client in seen.clients if client.figures)
        yield GaugeMetricFamily("shmbroker_channels_open", "Channels that clients claim to have open.", open_channels)
        told = sum(len(client.figures.channels) for client in seen.clients if client.figures)
        omitted = open_channels - min(told, MOST_CHANNELS)
        yield GaugeMetricFamily("shmbroker_channels_omitted", "Of them, those that this scrape does not tell of.", omitted)


_ARENA: tuple[tuple[str, str, bool, Callable[[ArenaFigures], float]], ...] = (
    ("arena_bytes", "Size of the client's arena.", False, lambda arena: arena.total_bytes),
    ("arena_held_bytes", "In blocks with living tensors.", False, lambda arena: arena.held_bytes),
    ("arena_held_blocks", "Blocks with living tensors.", False, lambda arena: arena.held_blocks),
    ("arena_high_water_bytes", "The most that was placed at once.", False, lambda arena: arena.high_water_bytes),
    ("arena_largest_free_bytes", "Largest free extent.", False, lambda arena: arena.largest_free_bytes),
    (
        "arena_oldest_block_seconds",
        "Age of the oldest block.",
        False,
        lambda arena: max([b.age_seconds for b in arena.blocks], default=0.0),
    ),
    ("arena_placed_blocks", "Blocks placed.", True, lambda arena: arena.placed_blocks),
    ("arena_waits", "How often there was no room at once.", True, lambda arena: arena.waits),
    ("arena_full", "How often there was no room before the deadline.", True, lambda arena: arena.full),
    ("arena_copied_bytes", "Copied into the arena by copy_in.", True, lambda arena: arena.copied_bytes),
)

_CHANNEL: tuple[tuple[str, str, bool, Callable[[ChannelFigures], float]], ...] = (
    ("calls", "Calls completed, also with an error.", True, lambda one: one.calls),
    ("call_errors", "Calls that failed or came too late.", True, lambda one: one.errors),
    ("call_copied_bytes", "Of inputs, copied into the arena.", True, lambda one: one.copied_bytes),
    ("calls_outstanding", "Calls on their way.", False, lambda one: one.outstanding),
    ("worker_calls", "Calls taken by the worker, as it says.", True, lambda one: one.run_calls),
    ("worker_errors", "Of them, answered with an error.", True, lambda one: one.failed_calls),
    ("worker_compute_seconds", "Running ops.", True, lambda one: one.compute_ns / 1e9),
    ("worker_queued_seconds", "From submission until the worker took the call.", True, lambda one: one.queued_ns / 1e9),
    ("worker_waiting_calls", "Submitted and not begun.", False, lambda one: one.waiting_calls),
    (
        "worker_share",
        "Of the time that the worker computed in the last second, what this client had: 0 to 1.",
        False,
        lambda one: one.share,
    ),
    ("worker_batched_calls", "Computed together with calls of other clients.", True, lambda one: one.batched_calls),
    (
        "worker_batched_with",
        "All calls of the batches that those were in; by worker_batched_calls it is their mean size.",
        True,
        lambda one: one.batched_with,
    ),
)


_TRUST: tuple[tuple[str, str, Callable[[ChannelFigures], float]], ...] = (
    ("checked", "Rows whose results were checked.", lambda one: one.checked),
    ("rejected", "Rows whose results were wrong.", lambda one: one.rejected),
    ("pads_taken", "Rows that were masked.", lambda one: one.pads_taken),
    ("pads_waited", "Rows that waited for a pad to be made.", lambda one: one.pads_waited),
)


def _family(name: str, text: str, counts: bool, labels: tuple[str, ...]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if counts else GaugeMetricFamily
    return kind(f"shmbroker_{name}", text, labels=labels)


def _of_arenas(seen: Observation) -> Iterator[Metric]:
    for name, text, counts, value in _ARENA:
        family = _family(name, text, counts, _CLIENT_LABELS)
        for client in seen.clients:
            if client.figures is not None:
                family.add_metric((client.peer.name, client.peer.peer), value(client.figures.arena))
        yield family


def _of_channels(seen: Observation) -> Iterator[Metric]:
    ranked = [
        (rank, client.peer, one)
        for client in seen.clients
        if client.figures is not None
        for rank, one in enumerate(client.figures.channels)
    ]
    # Every client's first before any client's second: who claims to have a thousand hides only its own.
    channels = [(peer, one) for _, peer, one in sorted(ranked, key=lambda entry: entry[0])]
    told = [
        ((peer.name, peer.peer, str(one.index), seen.name_of(one.worker), one.service, one.lane), one)
        for peer, one in channels[:MOST_CHANNELS]
    ]
    for name, text, counts, value in _CHANNEL:
        family = _family(name, text, counts, _CHANNEL_LABELS)
        for labels, one in told:
            family.add_metric(labels, value(one))
        yield family
    for name, text, count in _TRUST:
        counter = CounterMetricFamily(f"shmbroker_{name}", text, labels=(*_CHANNEL_LABELS, "trust"))
        for labels, one in told:
            if one.trust:
                counter.add_metric((*labels, one.trust), count(one))
        yield counter
    moved = CounterMetricFamily("shmbroker_bytes", "Handed over through shared memory.", labels=(*_CHANNEL_LABELS, "direction"))
    times = HistogramMetricFamily(
        "shmbroker_call_seconds", "From a call until its outputs are in the caller's hands.", labels=_CHANNEL_LABELS
    )
    for labels, one in told:
        moved.add_metric((*labels, "sent"), one.sent_bytes)
        moved.add_metric((*labels, "received"), one.received_bytes)
        times.add_metric(labels, _cumulative(one.buckets), one.call_ns / 1e9)
    yield moved
    yield times


def _cumulative(buckets: tuple[int, ...]) -> list[tuple[str, float]]:
    counted: list[tuple[str, float]] = []
    total = done = 0
    for bound in _BOUNDS:
        total += sum(buckets[done : bound + 1])
        done = bound + 1
        counted.append((repr(upper_bound_ns(bound) / 1e9), total))
    return [*counted, ("+Inf", total + sum(buckets[done:]))]
