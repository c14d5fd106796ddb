# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: the engine's counts, and those that only the service can see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from msdda_fast.batching.stats import EngineStats

__all__ = ["Metrics"]

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)


class Metrics:
    """The metrics of one app, in a registry of its own.

    Attributes:
        refusals: Number of refusals by code.
        latency: Seconds from request to response, for requests that got their images.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.refusals = Counter(
            "msdda_refusals", "Requests answered with an error.", ["code"], registry=self._registry
        )
        self.latency = Histogram(
            "msdda_request_seconds",
            "Seconds from request to images.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self, stats: EngineStats) -> bytes:
        """Return all metrics and the engine's counts in Prometheus' text format."""
        drawing = CollectorRegistry()
        drawing.register(_StatsCollector(stats))
        return generate_latest(self._registry) + generate_latest(drawing)


class _StatsCollector(Collector):
    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield GaugeMetricFamily("msdda_queue_images", "Images in the queue.", stats.waiting)
        yield GaugeMetricFamily("msdda_drawing_images", "Images being drawn.", stats.drawing)
        images = CounterMetricFamily("msdda_images", "Images by outcome.", labels=["outcome"])
        for outcome in ("completed", "cancelled", "timed_out", "failed", "refused"):
            images.add_metric([outcome], getattr(stats, outcome))
        yield images
        yield CounterMetricFamily(
            "msdda_drawing_seconds", "Seconds spent drawing batches.", stats.drawing_s
        )
        yield CounterMetricFamily("msdda_rows", "Rows computed, padding included.", stats.rows)
        sizes = range(1, max(stats.batch_sizes, default=1) + 1)
        counts = accumulate(stats.batch_sizes.get(size, 0) for size in sizes)
        buckets = [(str(float(size)), float(n)) for size, n in zip(sizes, counts, strict=True)]
        total = sum(size * count for size, count in stats.batch_sizes.items())
        yield HistogramMetricFamily(
            "msdda_batch_size",
            "Images per batch.",
            [*buckets, ("+Inf", float(stats.batches))],
            sum_value=total,
        )
