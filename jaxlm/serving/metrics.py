"""GET /metrics: counts and times for Prometheus, of one server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxlm.serving.models import Served
from jaxlm.serving.worker import EngineWorker

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAUGES = {
    "running": "continuations that are being written", "waiting": "continuations that wait for a slot",
    "pages": "pages of the cache", "pages_used": "pages of the cache in use",
}
_COUNTERS = {
    "prefill_tokens": "prompt tokens computed", "cached_tokens": "prompt tokens found in the cache",
    "generated_tokens": "tokens of answers", "draft_tokens": "tokens that a draft proposed",
    "accepted_tokens": "of these, tokens that were right", "preemptions": "continuations that gave their slot back",
    "steps": "steps of the engine", "compiles": "programs compiled",
}


class Metrics:
    """Its own registry, so that servers in one process do not mix."""

    def __init__(self, models: Sequence[Served]):
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "jaxlm_requests", "Requests by path and HTTP status", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "jaxlm_request_seconds", "Time of a request, to the last byte", ["path"], buckets=_SECONDS,
            registry=self._registry,
        )
        self.first = Histogram(
            "jaxlm_first_byte_seconds", "Time to the first byte of the body of an answer", ["path"], buckets=_SECONDS,
            registry=self._registry,
        )
        self.open = Gauge("jaxlm_open_requests", "Requests that are being answered", registry=self._registry)
        self._registry.register(_Workers(models))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class _Workers:
    """What workers and engines count themselves, read when it is asked for."""

    def __init__(self, models: Sequence[Served]):
        self._models = models

    def collect(self) -> Iterator[Metric]:
        places = GaugeMetricFamily("jaxlm_places_taken", "Answers that run or wait", labels=["model"])
        for served in self._models:
            places.add_metric([served.name], served.worker.taken)
        yield places
        engines = [(each.name, each.worker.engine) for each in self._models if isinstance(each.worker, EngineWorker)]
        for family, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, meaning in names.items():
                metric = family(f"jaxlm_engine_{name}", f"Of an engine: {meaning}", labels=["model"])
                for model, engine in engines:
                    metric.add_metric([model], getattr(engine.stats, name))
                yield metric
