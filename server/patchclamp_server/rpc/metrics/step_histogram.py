"""This histogram takes many observations at once, because every sequence of a step has one."""

from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class StepHistogram(Collector):
    """It has no labels. `observe` belongs to one thread; any thread may collect."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._bounds = np.array([*buckets, np.inf])
        # The counts of each bucket by itself and the sum of all are one object, so that a collector sees whole steps.
        self._seen = np.zeros(len(self._bounds), dtype=np.int64), 0.0
        registry.register(self)

    def observe(self, values: Sequence[float]) -> None:
        array = np.asarray(values, dtype=np.float64)
        counts, total = self._seen
        # A value is in the first bucket whose bound is not below it.
        own = np.bincount(np.searchsorted(self._bounds, array), minlength=len(counts))
        self._seen = counts + own, total + float(array.sum())

    def collect(self) -> Iterator[Metric]:
        counts, total = self._seen
        bounds = map(floatToGoString, self._bounds.tolist())
        buckets = list(zip(bounds, counts.cumsum().tolist(), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)
