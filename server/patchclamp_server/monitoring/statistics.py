"""Statistics are what a watch has seen, as arrays over its W items.

quantile  v with F(v) = p, F running straight through each bin of the histogram, whose ends are min and max
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchclamp_server.monitoring.accumulator import Sums
from patchclamp_server.monitoring.arrays import Floats, Ints
from patchclamp_server.monitoring.drift import Drift
from patchclamp_server.monitoring.scale import Scale


@dataclass(frozen=True, eq=False)
class KindStatistics:
    """The items of one kind together; min is inf and max -inf where there are no values."""

    name: str
    items: int
    values: int
    fired: int
    not_finite: int
    left_out: int
    positive: float
    negative: float
    min: float
    max: float
    buckets: tuple[float, ...]
    bucket_counts: Ints  # [buckets + 1]

    @property
    def mean(self) -> float:
        return (self.positive - self.negative) / max(self.values, 1)


@dataclass(frozen=True, eq=False)
class Statistics:
    """`sums.tokens` counts finite values at tokens that are not outliers, and all figures but `sums.not_finite` and
    `sums.left_out` are about those. The histogram counts since its `edges` have been in use: those of the reference,
    else the buckets."""

    sums: Sums  # [W]; min inf and max -inf where there are no tokens
    edges: Floats  # [W, k]; bin j holds edges[j-1] < value <= edges[j]
    scale: Scale
    kind_names: tuple[str, ...]
    kind_of: Ints  # [W], in kind_names
    rows: int
    # These are rows at position 0, which are in no other figure.
    sinks: int = 0
    # The scale is derived from first tokens: these tell how many there are, and how many there will be.
    calibrated: int = 0
    calibration: int = 0
    # This is the drift of the last full window; None without a reference, and before a window is full.
    drift: Drift | None = None

    @property
    def tokens(self) -> Ints:
        """The counted tokens [W]."""
        tokens: Ints = self.sums.tokens
        return tokens

    @property
    def calibrating(self) -> bool:
        """Whether thresholds, buckets and outliers still change."""
        return self.calibrated < self.calibration

    @property
    def total(self) -> Floats:
        """The sum of the values [W]."""
        total: Floats = self.sums.positive - self.sums.negative
        return total

    @property
    def mean(self) -> Floats:
        return self.total / np.maximum(self.tokens, 1)

    def kinds(self) -> list[KindStatistics]:
        found = []
        sums = self.sums
        for place, name in enumerate(self.kind_names):
            own = self.kind_of == place
            buckets = self.scale.buckets[place]
            found.append(
                KindStatistics(
                    name=name,
                    items=int(own.sum()),
                    values=int(sums.tokens[own].sum()),
                    fired=int(sums.fired[own].sum()),
                    not_finite=int(sums.not_finite[own].sum()),
                    left_out=int(sums.left_out[own].sum()),
                    positive=float(sums.positive[own].sum()),
                    negative=float(sums.negative[own].sum()),
                    min=float(sums.min[own].min()),
                    max=float(sums.max[own].max()),
                    buckets=buckets,
                    bucket_counts=sums.bucket_counts[place, : len(buckets) + 1],
                )
            )
        return found

    @property
    def deviation(self) -> Floats:
        """The deviation of the values seen, not an estimate for others."""
        variance = self.sums.total_squares / np.maximum(self.tokens, 1) - self.mean**2
        deviation: Floats = np.sqrt(np.maximum(variance, 0.0))
        return deviation

    def quantiles(self, probabilities: Sequence[float]) -> Floats:
        """Returns [W, probabilities]; NaN where nothing has been counted."""
        seen = self.tokens > 0
        low, high = (np.where(seen, end, 0.0)[:, None] for end in (self.sums.min, self.sums.max))
        # Nothing lies beyond min and max.
        ends = np.clip(np.concatenate((low, self.edges, high), axis=1), low, high)
        histogram = self.sums.histogram
        upto = histogram.cumsum(axis=1)
        found = np.full((len(self.tokens), len(probabilities)), np.nan)
        for item in np.flatnonzero(upto[:, -1]).tolist():
            for i, probability in enumerate(probabilities):
                target = probability * upto[item, -1]
                place = int(np.searchsorted(upto[item], target))
                inside = histogram[item, place]
                share = (target - (upto[item, place] - inside)) / inside if inside else 0.0
                start, end = ends[item, place : place + 2]
                found[item, i] = start + share * (end - start)
        return found
