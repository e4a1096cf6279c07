"""GET /metrics: counts and times of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxlm.serving.models import ServedModel
from jaxlm.serving.worker import EngineWorker

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# The part of the metric's name after "jaxlm_engine_": (the field of the engine's ``Stats``, what it means).
_GAUGES = {
    "running": ("running", "continuations that are being generated"),
    "waiting": ("waiting", "continuations that wait for a slot"),
    "pages": ("pages", "pages of the cache"),
    "pages_used": ("pages_used", "pages of the cache that are in use"),
}
_COUNTERS = {
    "tokens_read": ("prefill_tokens", "prompt tokens"),
    "tokens_hit": ("cached_tokens", "prompt tokens that were in the cache already"),
    "tokens_written": ("generated_tokens", "generated tokens"),
    "drafts": ("draft_tokens", "tokens that a draft model proposed"),
    "drafts_accepted": ("accepted_tokens", "proposed tokens that were accepted"),
    "preemptions": ("preemptions", "continuations that gave their slot back"),
    "steps": ("steps", "steps of the engine"),
    "compiles": ("compilations", "programs compiled"),
}


class Metrics:
    """The metrics of one server, in a registry of its own, so that servers in one process stay apart."""

    def __init__(self, models: Sequence[ServedModel]):
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "jaxlm_requests", "Requests by path and HTTP status", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "jaxlm_request_seconds", "Time of a request, until the last byte of the response", ["path"],
            buckets=_SECONDS, registry=self._registry,
        )
        self.first_byte = Histogram(
            "jaxlm_first_byte_seconds", "Time until the first byte of the response's body", ["path"],
            buckets=_SECONDS, registry=self._registry,
        )
        self.open = Gauge("jaxlm_open_requests", "Requests in progress", registry=self._registry)
        self._registry.register(_WorkerCollector(models))

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _WorkerCollector:
    """What workers and engines count themselves, read at every scrape."""

    def __init__(self, models: Sequence[ServedModel]):
        self._models = models

    def collect(self) -> Iterator[Metric]:
        places = GaugeMetricFamily("jaxlm_places_taken", "Continuations that run or wait", labels=["model"])
        for served in self._models:
            places.add_metric([served.name], served.worker.in_use)
        yield places
        engines = [(each.name, each.worker.engine) for each in self._models if isinstance(each.worker, EngineWorker)]
        for family, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (field, meaning) in metrics.items():
                metric = family(f"jaxlm_engine_{name}", f"Of an engine: {meaning}", labels=["model"])
                for model, engine in engines:
                    metric.add_metric([model], getattr(engine.stats, field))
                yield metric
