"""What running watches tell Prometheus, read once at each scrape. The one label of a watch is its name: the names are
those of the watches that run, of which there is a cap, and the series of one end with it.

Figures are of all items of a watch together: one series for each of thousands of items would be the end of any
Prometheus; item by item they are in GetWatchStatistics.
"""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from patchclamp_server.errors import NotFound
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.statistics import Statistics

WATCH = ("watch",)


class WatchCollector(Collector):
    """`dropped`: events that subscribers of a running watch did not get, because they read too slowly."""

    def __init__(self, registry: WatchRegistry, dropped: Callable[[RunningWatch], int]) -> None:
        self._registry = registry
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        families = Families()
        running = self._registry.running()
        for watch in running:
            try:
                statistics = self._registry.statistics(watch.name)
            except NotFound:  # stopped since
                continue
            families.add(watch.name, statistics, self._dropped(watch))
        families.add_caps(running, self._registry)
        return families.all()

    def describe(self) -> Iterator[Metric]:
        """Without values: registering must not ask an engine that has not started."""
        return Families().all()


class Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self.tokens = CounterMetricFamily(
            "patchclamp_watch_tokens", "Tokens that a watch has seen since it was started.", labels=WATCH
        )
        self.fired = CounterMetricFamily(
            "patchclamp_watch_fired", "Values above the thresholds of their items.", labels=WATCH
        )
        self.not_finite = CounterMetricFamily(
            "patchclamp_watch_not_finite", "Values that were not finite; in no other figure.", labels=WATCH
        )
        self.dropped = CounterMetricFamily(
            "patchclamp_watch_events_dropped", "Events that slow readers of a watch did not get.", labels=WATCH
        )
        self.mean = GaugeMetricFamily("patchclamp_watch_mean", "Mean of all values since the start.", labels=WATCH)
        self.max = GaugeMetricFamily("patchclamp_watch_max", "Largest value since the start.", labels=WATCH)
        self.drift = GaugeMetricFamily(
            "patchclamp_watch_drift_ratio",
            "Total variation distance of the last window from the reference, 0 to 1: over the items the mean, the max.",
            labels=("watch", "statistic"),
        )
        self.activation = HistogramMetricFamily("patchclamp_watch_activation", "Values of all items.", labels=WATCH)
        self.caps = [
            GaugeMetricFamily("patchclamp_watches", "Watches that run."),
            GaugeMetricFamily("patchclamp_watches_limit", "Watches that may run."),
            GaugeMetricFamily("patchclamp_watch_items", "Items of the watches that run."),
            GaugeMetricFamily("patchclamp_watch_items_limit", "Items that may be watched."),
        ]

    def add(self, name: str, seen: Statistics, dropped: int) -> None:
        label = (name,)
        self.tokens.add_metric(label, seen.rows)
        self.fired.add_metric(label, int(seen.fired.sum()))
        self.not_finite.add_metric(label, int(seen.not_finite.sum()))
        self.dropped.add_metric(label, dropped)
        counts = seen.bucket_counts.cumsum().tolist()
        bounds = [*map(str, seen.buckets), "+Inf"]
        # Values may be negative, and a sum that falls is no counter: there is none, and so no count beside +Inf.
        self.activation.add_metric(label, list(zip(bounds, counts, strict=True)), sum_value=None)
        values = int(seen.tokens.sum())
        if values:
            self.mean.add_metric(label, float(seen.total.sum()) / values)
            self.max.add_metric(label, float(seen.max.max()))
        for statistic, drift in (("mean", seen.mean_drift), ("max", seen.max_drift)):
            if drift is not None:
                self.drift.add_metric((name, statistic), drift)

    def add_caps(self, running: list[RunningWatch], registry: WatchRegistry) -> None:
        items = sum(len(watch.watch) for watch in running)
        values = (len(running), registry.max_watches, items, registry.max_items)
        for family, value in zip(self.caps, values, strict=True):
            family.add_metric((), value)

    def all(self) -> Iterator[Metric]:
        yield from (self.tokens, self.fired, self.not_finite, self.dropped)
        yield from (self.mean, self.max, self.drift, self.activation)
        yield from self.caps
