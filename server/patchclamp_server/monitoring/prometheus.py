"""Running watches are shown to Prometheus, read once at each scrape. Labels are the name of a watch, whose number is
capped, and the kind of its items; the series of a watch end with it.

Figures cover the items of one kind together: those of a neuron, a direction and a head have nothing in common, and one
series for each of thousands of items would be too much for any Prometheus; GetWatchStatistics has them item by item.
Where a watch asks for it, each of its items has its own series, with its name as a label: at most MAX_EXPORTED_ITEMS.

    mean over any time = (rate(positive_sum) - rate(negative_sum)) / rate(values)

Positive and negative values are summed apart because a counter must not fall.
"""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from patchclamp_server.errors import NotFound
from patchclamp_server.monitoring.drift import Drift
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.statistics import KindStatistics, Statistics

WATCH = ("watch",)
KIND = ("watch", "kind")
ITEM = ("watch", "item")


class WatchCollector(Collector):
    """`dropped` counts the events that subscribers of a running watch did not get, because they read too slowly.
    `refused` counts the watches of the store that cannot run here."""

    def __init__(
        self, registry: WatchRegistry, dropped: Callable[[RunningWatch], int], refused: Callable[[], int]
    ) -> None:
        self._registry = registry
        self._dropped = dropped
        self._refused = refused

    def collect(self) -> Iterator[Metric]:
        families = Families()
        running = self._registry.running()
        for watch in running:
            try:
                statistics = self._registry.statistics(watch.name)
            except NotFound:  # it was stopped meanwhile
                continue
            families.add(watch, statistics, self._dropped(watch))
        families.add_caps(running, self._registry, self._refused())
        return families.all()

    def describe(self) -> Iterator[Metric]:
        """Describes metrics without values: registering must not ask an engine that has not started."""
        return Families().all()


class Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self.tokens = CounterMetricFamily(
            "patchclamp_watch_tokens", "Tokens that a watch has seen since it was started.", labels=WATCH
        )
        self.sinks = CounterMetricFamily(
            "patchclamp_watch_sink_tokens", "First tokens of sequences; in no other figure.", labels=WATCH
        )
        self.dropped = CounterMetricFamily(
            "patchclamp_watch_events_dropped", "Events that slow readers of a watch did not get.", labels=WATCH
        )
        self.calibrating = GaugeMetricFamily(
            "patchclamp_watch_calibrating",
            "1 while thresholds, buckets and the norms of outliers are being derived: no figure of values is shown.",
            labels=WATCH,
        )
        self.values = CounterMetricFamily("patchclamp_watch_values", "Finite values.", labels=KIND)
        self.positive = CounterMetricFamily(
            "patchclamp_watch_positive_sum", "Sum of the values above 0, in their own unit.", labels=KIND
        )
        self.negative = CounterMetricFamily(
            "patchclamp_watch_negative_sum", "Sum of the values below 0, without their sign.", labels=KIND
        )
        self.fired = CounterMetricFamily(
            "patchclamp_watch_fired", "Values above the thresholds of their items.", labels=KIND
        )
        self.not_finite = CounterMetricFamily(
            "patchclamp_watch_not_finite", "Values that were not finite; in no other figure.", labels=KIND
        )
        self.left_out = CounterMetricFamily(
            "patchclamp_watch_left_out",
            "Values at tokens whose norm is above 3 times the median (attention sinks); in no other figure.",
            labels=KIND,
        )
        self.min = GaugeMetricFamily("patchclamp_watch_min", "Least value since the start.", labels=KIND)
        self.max = GaugeMetricFamily("patchclamp_watch_max", "Largest value since the start.", labels=KIND)
        self.activation = HistogramMetricFamily("patchclamp_watch_activation", "Values.", labels=KIND)
        statistic = (*WATCH, "statistic")
        self.drift = GaugeMetricFamily(
            "patchclamp_watch_drift_ratio",
            "Total variation distance of the last window from the reference, 0 to 1: over the items the mean, the max.",
            labels=statistic,
        )
        self.noise = GaugeMetricFamily(
            "patchclamp_watch_drift_noise_ratio", "What of it chance alone is expected to make.", labels=statistic
        )
        self.excess = GaugeMetricFamily(
            "patchclamp_watch_drift_excess_ratio", "Drift beyond that of chance, at least 0.", labels=statistic
        )
        self.item_values = CounterMetricFamily("patchclamp_watch_item_values", "Values of an item.", labels=ITEM)
        self.item_positive = CounterMetricFamily(
            "patchclamp_watch_item_positive_sum", "Sum of the values of an item above 0.", labels=ITEM
        )
        self.item_negative = CounterMetricFamily(
            "patchclamp_watch_item_negative_sum", "Sum of those below 0, without their sign.", labels=ITEM
        )
        self.item_fired = CounterMetricFamily(
            "patchclamp_watch_item_fired", "Values of an item above its threshold.", labels=ITEM
        )
        self.item_left_out = CounterMetricFamily(
            "patchclamp_watch_item_left_out", "Values of an item at tokens that are left out.", labels=ITEM
        )
        self.item_threshold = GaugeMetricFamily(
            "patchclamp_watch_item_threshold", "Above which an item fires.", labels=ITEM
        )
        self.item_excess = GaugeMetricFamily(
            "patchclamp_watch_item_drift_excess_ratio", "Drift of an item beyond that of chance.", labels=ITEM
        )
        self.caps = [
            GaugeMetricFamily("patchclamp_watches", "Watches that run."),
            GaugeMetricFamily("patchclamp_watches_limit", "Watches that may run."),
            GaugeMetricFamily("patchclamp_watch_items", "Items of the watches that run."),
            GaugeMetricFamily("patchclamp_watch_items_limit", "Items that may be watched."),
        ]
        self.refused = GaugeMetricFamily("patchclamp_watches_refused", "Watches of the store that cannot run here.")

    def add(self, watch: RunningWatch, seen: Statistics, dropped: int) -> None:
        name = watch.name
        self.tokens.add_metric((name,), seen.rows)
        self.sinks.add_metric((name,), seen.sinks)
        self.dropped.add_metric((name,), dropped)
        self.calibrating.add_metric((name,), int(seen.calibrating))
        if seen.calibrating:  # counts that are judged anew with every token are not counters
            return
        for kind in seen.kinds():
            self._add_kind((name, kind.name), kind)
        if seen.drift is not None:
            self._add_drift(name, seen.drift)
        if watch.options.export_items:
            self._add_items(watch, seen)

    def _add_kind(self, label: tuple[str, str], kind: KindStatistics) -> None:
        self.values.add_metric(label, kind.values)
        self.positive.add_metric(label, kind.positive)
        self.negative.add_metric(label, kind.negative)
        self.not_finite.add_metric(label, kind.not_finite)
        self.left_out.add_metric(label, kind.left_out)
        if kind.values:
            self.min.add_metric(label, kind.min)
            self.max.add_metric(label, kind.max)
        self.fired.add_metric(label, kind.fired)
        bounds = [*map(str, kind.buckets), "+Inf"]
        # Values may be negative, and a sum that falls is not a counter: so there is no sum, and no count beside +Inf.
        counts = zip(bounds, kind.bucket_counts.cumsum().tolist(), strict=True)
        self.activation.add_metric(label, list(counts), sum_value=None)

    def _add_drift(self, name: str, drift: Drift) -> None:
        for statistic, distance, noise, excess in (
            ("mean", drift.mean, drift.mean_noise, drift.mean_excess),
            ("max", drift.max, drift.max_noise, drift.max_excess),
        ):
            self.drift.add_metric((name, statistic), distance)
            self.noise.add_metric((name, statistic), noise)
            self.excess.add_metric((name, statistic), excess)

    def _add_items(self, watch: RunningWatch, seen: Statistics) -> None:
        sums = seen.sums
        for i, item in enumerate(watch.watch.names):
            label = (watch.name, item)
            self.item_values.add_metric(label, int(sums.tokens[i]))
            self.item_positive.add_metric(label, float(sums.positive[i]))
            self.item_negative.add_metric(label, float(sums.negative[i]))
            self.item_left_out.add_metric(label, int(sums.left_out[i]))
            self.item_fired.add_metric(label, int(sums.fired[i]))
            self.item_threshold.add_metric(label, float(seen.scale.thresholds[i]))
            if seen.drift is not None:
                self.item_excess.add_metric(label, float(seen.drift.excess[i]))

    def add_caps(self, running: list[RunningWatch], registry: WatchRegistry, refused: int) -> None:
        items = sum(len(watch.watch) for watch in running)
        values = (len(running), registry.max_watches, items, registry.max_items)
        for family, value in zip(self.caps, values, strict=True):
            family.add_metric((), value)
        self.refused.add_metric((), refused)

    def all(self) -> Iterator[Metric]:
        yield from (self.tokens, self.sinks, self.dropped, self.calibrating)
        yield from (self.values, self.positive, self.negative, self.fired, self.not_finite, self.left_out)
        yield from (self.min, self.max, self.activation, self.drift, self.noise, self.excess)
        yield from (self.item_values, self.item_positive, self.item_negative, self.item_fired)
        yield from (self.item_left_out, self.item_threshold, self.item_excess, self.refused)
        yield from self.caps
