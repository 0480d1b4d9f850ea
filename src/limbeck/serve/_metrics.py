"""What Prometheus may ask, over one process or several."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from limbeck.errors import missing_extra

__all__ = ["Metrics"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server. With several workers they meet in the folder that ``PROMETHEUS_MULTIPROC_DIR`` names."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise missing_extra("prometheus-client", "serve", "Serving") from None
        self._client: Any = prometheus
        own = prometheus.CollectorRegistry()
        several = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry: Any = own
        if several:
            from prometheus_client import multiprocess

            self._registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        count, histogram = prometheus.Counter, prometheus.Histogram
        self._requests = count("limbeck_requests", "Requests answered.", ("route", "method", "status"), registry=own)
        self._seconds = histogram("limbeck_request_seconds", "From the header to the answer.", ("route",), buckets=_SECONDS, registry=own)
        self._refused = count("limbeck_refused", "Requests refused by a limit.", ("limit",), registry=own)
        self._batch_rows = histogram("limbeck_batch_rows", "Rows of a batch.", ("model", "version"), buckets=_ROWS, registry=own)
        self._batch_seconds = histogram(
            "limbeck_batch_seconds", "A batch in the model.", ("model", "version"), buckets=_SECONDS, registry=own
        )
        self._queue = prometheus.Gauge(
            "limbeck_queue_rows", "Rows that wait.", ("model", "version"), registry=own, multiprocess_mode="livesum"
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, limit: str) -> None:
        self._refused.labels(limit).inc()

    def batches(self, model: str, version: str, waiting: Callable[[], int]) -> Callable[[int, float], None]:
        """What a model's batcher tells of every batch."""
        rows, seconds = self._batch_rows.labels(model, version), self._batch_seconds.labels(model, version)
        queue = self._queue.labels(model, version)

        def seen(count: int, took: float) -> None:
            rows.observe(count)
            seconds.observe(took)
            queue.set(waiting())

        return seen

    def text(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        return self._client.generate_latest(self._registry), self._client.CONTENT_TYPE_LATEST
