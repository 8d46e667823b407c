"""Prometheus metrics of one gateway: names `longreach_*` with units. A registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

from .results import Outcome

_TTFT_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 3600)
_ROW_BUCKETS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)


class Metrics:
    """Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """What a scrape sees: the gateway's own, and the collectors that were added."""
        registry = self._own = CollectorRegistry()
        self.registry.register(registry)  # type: ignore[arg-type]
        self._queued = Gauge("longreach_rows_queued", "Batch rows waiting", registry=registry)
        self._running = Gauge("longreach_rows_running", "Batch rows running", registry=registry)
        self._workers = Gauge("longreach_workers_live", "Live decode workers", registry=registry)
        self._streams = Gauge("longreach_streams_open", "Open gRPC streams", registry=registry)
        self._rows = Counter("longreach_rows", "Rows ended", ["kind", "outcome"], registry=registry)
        self._failures = Counter(
            "longreach_failures",
            "Errors answered or noted",
            ["during", "reason"],
            registry=registry,
        )
        self._losses = Counter(
            "longreach_row_losses",
            "Attempts that ended without an answer",
            ["reason"],
            registry=registry,
        )
        self._prompt = Counter("longreach_prompt_tokens", "Prompt tokens", registry=registry)
        self._reused = Counter(
            "longreach_reused_tokens", "Prompt tokens not computed again", registry=registry
        )
        self._decoded = Counter("longreach_generation_tokens", "New tokens", registry=registry)
        self._ttft = Histogram(
            "longreach_time_to_first_token_seconds",
            "From start to first token",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self._latency = Histogram(
            "longreach_e2e_row_latency_seconds",
            "From start to end of a row",
            buckets=_ROW_BUCKETS,
            registry=registry,
        )
        self._server: Any = None

    def serve(self, host: str, port: int) -> int:
        """Answer scrapes at /metrics; the port. Raises OSError if it is taken."""
        self._server, _ = start_http_server(port, addr=host, registry=self.registry)
        return int(self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def add(self, collector: Collector) -> None:
        """Metrics of others, read when scraped; `numbers` leaves them out."""
        self.registry.register(collector)

    def watch(
        self,
        queued: Callable[[], float],
        running: Callable[[], float],
        workers: Callable[[], float],
        streams: Callable[[], float],
    ) -> None:
        """Gauges that are read when scraped."""
        self._queued.set_function(queued)
        self._running.set_function(running)
        self._workers.set_function(workers)
        self._streams.set_function(streams)

    def answered(self, kind: str, outcome: Outcome, seconds: float) -> None:
        self._rows.labels(kind, outcome.finish_reason).inc()
        stats = outcome.stats
        self._prompt.inc(max(0.0, stats.get("tokens_prompt", 0.0)))
        self._reused.inc(max(0.0, stats.get("tokens_reused", 0.0)))
        self._decoded.inc(outcome.n_tokens)
        if "ttft_s" in stats:
            self._ttft.observe(stats["ttft_s"])
        self._latency.observe(seconds)

    def failed(self, kind: str, reason: str) -> None:
        self._rows.labels(kind, "failed").inc()
        self._failures.labels(kind, reason).inc()

    def refused(self, method: str, reason: str) -> None:
        self._failures.labels(method, reason).inc()

    def lost(self, reason: str) -> None:
        self._losses.labels(reason).inc()

    def numbers(self) -> dict[str, float]:
        """All samples of the gateway without buckets, by name and labels."""
        found = {}
        for metric in self._own.collect():
            for sample in metric.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    labels = "".join(f"_{value}" for value in sample.labels.values())
                    found[sample.name.removeprefix("longreach_") + labels] = float(sample.value)
        return found
