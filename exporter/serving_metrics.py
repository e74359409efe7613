"""A serving process's metrics, on a registry passed in: their names, help texts, labels and buckets.

A metric is added here, in the table of deploy/README.md and on the dashboard; tests compare the three. Known label
values are made with their metric, at 0, so that `rate()` and alerts work from the first scrape on. The agent's metrics
are in exporter.instruments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
"""Bounds of the buckets for seconds, chosen by hand: about a factor of two apart, from one image through a small model
up to a wait that a client hardly bears. Other bounds start other series, with which the old ones cannot be added up."""

_IMAGES = [1, 2, 4, 8, 16, 32, 64, 128]
"""Bounds of the buckets for images in a batch, up to twice the default of serve.max_batch. Changing them has the same
price."""


class ServeMetrics:
    """All metrics of one process that answers over HTTP, prefixed `gapstream_serve_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Put the metrics on `registry`. Raises ValueError when it already has them."""
        common: dict[str, Any] = {"namespace": "gapstream_serve", "registry": registry}
        ProcessCollector(registry=registry)
        self.requests = Counter("requests", "Requests to classify, by HTTP status", ["code"], **common)
        self.images = Counter("images", "Images answered, or unusable", ["result"], **common)
        for result in ("ok", "rejected"):
            self.images.labels(result)
        self.seconds = Histogram("request_duration_seconds", "Seconds of a request", buckets=_SECONDS, **common)
        self.batch = Histogram("batch_images", "Images that went through the model at once", buckets=_IMAGES, **common)
        self.in_flight = Gauge("requests_in_flight", "Requests being worked on", **common)
        self.release = Info("release", "The release that answers", **common)
        self.made = Gauge("release_timestamp_seconds", "When the release that answers was made", **common)
        self.followed = Gauge(
            "release_current_timestamp_seconds", "When the release that answers was last found to be current", **common
        )


class KafkaMetrics:
    """The metrics that a process which also answers topics has besides ServeMetrics, prefixed `gapstream_serve_kafka_`.
    A message counts once its transaction is committed."""

    def __init__(self, registry: CollectorRegistry, reasons: Iterable[str]) -> None:
        """Put the metrics on `registry`. `reasons`: every reason why a message cannot be answered. Raises ValueError
        when the registry already has them."""
        common: dict[str, Any] = {"namespace": "gapstream_serve_kafka", "registry": registry}
        self.records = Counter("records", "Messages passed, marks included", ["topic"], **common)
        self.predictions = Counter("predictions", "Images of messages answered", **common)
        self.rejected = Counter("rejected_records", "Messages answered with an error", ["reason"], **common)
        self.lag = Gauge("lag_records", "Messages that wait, of the partitions held", ["topic", "partition"], **common)
        self.seconds = Histogram(
            "batch_duration_seconds", "Seconds from messages to committed predictions", buckets=_SECONDS, **common
        )
        self.transactions = Counter("transactions", "Transactions, by how they ended", ["result"], **common)
        for reason in reasons:
            self.rejected.labels(reason)
        for result in ("committed", "aborted"):
            self.transactions.labels(result)
