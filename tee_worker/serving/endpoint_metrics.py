"""What an endpoint counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from tee_worker.serving.engine import Load

PREFIX = "shmbroker_serve"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class EndpointMetrics:
    """The counts of one endpoint."""

    def __init__(self, load: Callable[[], Load], most: int) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(f"{PREFIX}_requests", "Requests answered, by path and status.", ["path", "status"], registry=self._registry)
        self.prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.generated_tokens = Counter(f"{PREFIX}_generated_tokens", "Tokens generated.", registry=self._registry)
        self.first_token = Histogram(
            f"{PREFIX}_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            f"{PREFIX}_request_seconds", "From a request's arrival to its last token.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_OfLoad(load, most))

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _OfLoad(Collector):
    def __init__(self, load: Callable[[], Load], most: int) -> None:
        self._load = load
        self._most = most

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, text, value in (
            ("running", "Sequences that are computed together now: the batch.", load.running),
            ("waiting", "Sequences that wait for a place in the batch.", load.waiting),
            ("max_concurrency", "Places in the batch.", self._most),
            ("cache_blocks_used", "Blocks of the cache of keys and values that are in use.", load.blocks_used),
            ("cache_blocks", "Blocks of the cache of keys and values.", load.blocks),
            ("passes", "Forward passes of the present batch.", load.passes),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
