"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from t5_trt.serving.engine import Engine
from t5_trt.serving.http.record import Record

_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Of one server, in a registry of its own.

    Args:
        engine: that is served.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Load(engine))
        options: Any = {"registry": self._registry, "namespace": "t5_trt"}
        self._requests = Counter("requests", "HTTP requests that have ended", ["route", "status"], **options)
        self._errors = Counter("errors", "requests that were refused or have failed, and why", ["reason"], **options)
        self._read = Counter("prompt_tokens", "tokens of texts that were submitted", **options)
        self._made = Counter("completion_tokens", "tokens that were generated", **options)
        self._first = Histogram(
            "first_token_seconds", "from a request's arrival to its first token", buckets=_FIRST_TOKEN_S, **options
        )
        self._each = Histogram(
            "token_seconds", "of a token behind the first, a request's average", buckets=_TOKEN_S, **options
        )

    def count(self, record: Record) -> None:
        """Add a request that has ended."""
        self._requests.labels(record.route or "none", str(record.status)).inc()
        if record.reason is not None:
            self._errors.labels(record.reason).inc()
        self._read.inc(record.prompt_tokens)
        self._made.inc(record.new_tokens)
        for seconds in record.first_token_s():
            self._first.observe(seconds)
        for seconds in record.token_s():
            self._each.observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self._registry)


class _Load(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """What waits and runs, read when it is asked for."""
        stats = self._engine.stats()
        yield GaugeMetricFamily("t5_trt_waiting", "requests of the engine without a row", value=stats.waiting)
        yield GaugeMetricFamily("t5_trt_running", "requests of the engine in rows", value=stats.running)
