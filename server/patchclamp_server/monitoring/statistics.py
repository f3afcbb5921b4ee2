"""What a watch has seen, as arrays over its W items.

quantile  v with F(v) = p, F running straight through each bin of the histogram, whose ends are min and max
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchclamp_server.monitoring.reference import Floats, Ints


@dataclass(frozen=True, eq=False)
class Statistics:
    """`tokens` counts finite values, and all but `not_finite` is about those. `histogram` counts since its `edges` have
    been in use: those of the reference, else the buckets. `bucket_counts` is of all items together."""

    tokens: Ints  # [W]
    fired: Ints
    not_finite: Ints
    total: Floats
    total_squares: Floats
    min: Floats  # inf where there are no tokens
    max: Floats  # -inf where there are no tokens
    edges: Floats  # [W, k]; bin j holds edges[j-1] < value <= edges[j]
    histogram: Ints  # [W, k + 1]
    buckets: tuple[float, ...]
    bucket_counts: Ints  # [buckets + 1]
    rows: int
    # Of the last full window; None without a reference, and before a window is full.
    drift: Floats | None = None

    @property
    def mean(self) -> Floats:
        return self.total / np.maximum(self.tokens, 1)

    @property
    def deviation(self) -> Floats:
        """Of the values seen, not an estimate for others."""
        variance = self.total_squares / np.maximum(self.tokens, 1) - self.mean**2
        deviation: Floats = np.sqrt(np.maximum(variance, 0.0))
        return deviation

    @property
    def mean_drift(self) -> float | None:
        return None if self.drift is None else float(self.drift.mean())

    @property
    def max_drift(self) -> float | None:
        return None if self.drift is None else float(self.drift.max())

    def quantiles(self, probabilities: Sequence[float]) -> Floats:
        """[W, probabilities]; NaN where nothing has been counted."""
        seen = self.tokens > 0
        low, high = np.where(seen, self.min, 0.0)[:, None], np.where(seen, self.max, 0.0)[:, None]
        # Nothing lies beyond min and max.
        ends = np.clip(np.concatenate((low, self.edges, high), axis=1), low, high)
        upto = self.histogram.cumsum(axis=1)
        found = np.full((len(self.tokens), len(probabilities)), np.nan)
        for item in np.flatnonzero(upto[:, -1]).tolist():
            for i, probability in enumerate(probabilities):
                target = probability * upto[item, -1]
                place = int(np.searchsorted(upto[item], target))
                inside = self.histogram[item, place]
                share = (target - (upto[item, place] - inside)) / inside if inside else 0.0
                start, end = ends[item, place : place + 2]
                found[item, i] = start + share * (end - start)
        return found
