"""Thresholds and buckets that nobody chose are derived from the values themselves, because numbers that fit one model
and layer say nothing of another, whose 99th percentile may be 0.2 or 562.

    threshold of an item   the quantile that its item asks for, interpolated
    buckets of a kind      quantiles of the values of all its items, and what may yet come: the largest value, and
                           once and three times the range beyond it; the same below, where there are negative values

They come from a reference where the watch is started with one, else from the first tokens that it sees, and then they
stay. So do the norms that tell outliers (outliers.py), which are in neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.monitoring.arrays import Float32s, Floats
from patchclamp_server.monitoring.outliers import Outliers
from patchclamp_server.monitoring.reference import LEVELS, Reference
from patchclamp_server.monitoring.watch import Watch, WatchOptions

Buckets = tuple[tuple[float, ...], ...]

_BUCKET_QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_DIGITS = 3
# So many values are sorted for the buckets of a kind.
_MOST_VALUES = 2**16
# So many values of the first tokens are kept: 4 MiB, and 40 ms of the engine's thread once, when they are full.
_MOST_KEPT = 2**20


class Source(Enum):
    CHOSEN = "chosen"
    REFERENCE = "reference"
    FIRST_TOKENS = "first tokens"


@dataclass(frozen=True, eq=False)
class Scale:
    """`buckets` has the ascending bounds of each kind of the watch."""

    thresholds: Floats  # [W]
    buckets: Buckets
    source: Source


def chosen_scale(watch: Watch, options: WatchOptions) -> Scale | None:
    """Returns the scale that the client chose; None where something is to be derived."""
    if not options.buckets or asking(watch).any():
        return None
    return Scale(watch.thresholds.numpy(), (options.buckets,) * len(watch.kind_names), Source.CHOSEN)


def scale_of_reference(watch: Watch, options: WatchOptions, reference: Reference) -> Scale | None:
    """Returns the scale that follows from a reference; None where the reference is an old one, which has no levels."""
    if reference.levels is None:
        return None
    levels = reference.levels.numpy()
    grid = np.union1d(np.linspace(0.0, 1.0, 201), LEVELS)
    sample = np.stack([np.interp(grid, LEVELS, row) for row in levels], axis=1)  # [grid, W]
    thresholds = watch.thresholds.numpy().copy()
    for item in np.flatnonzero(asking(watch)).tolist():
        thresholds[item] = np.interp(float(watch.quantiles[item]), LEVELS, levels[item])
    return Scale(thresholds, _buckets(watch, options, sample), Source.REFERENCE)


def calibration_size(watch: Watch, options: WatchOptions) -> int:
    """Returns from how many tokens thresholds, buckets and outliers are derived."""
    return max(1, min(options.calibration_tokens, _MOST_KEPT // len(watch)))


class FirstTokens:
    """Keeps the values [n, W] and norms [n, places] of the first tokens of a watch, until there are `total` of them."""

    def __init__(self, watch: Watch, options: WatchOptions, known: Outliers | None = None) -> None:
        """`known` are outliers that do not follow from the first tokens."""
        self._watch, self._options, self.known = watch, options, known
        self.total = calibration_size(watch, options)
        self._kept = np.empty((self.total, len(watch) + len(watch.places)), dtype=np.float32)
        self.seen = 0

    @property
    def left(self) -> int:
        return self.total - self.seen

    @property
    def values(self) -> Float32s:
        """The values [n, W + places]: the norms follow the values."""
        return self._kept[: self.seen]

    def add(self, values: Float32s, norms: Float32s) -> None:
        """Adds at most `left` tokens."""
        n = len(values)
        np.concatenate((values, norms), axis=1, out=self._kept[self.seen : self.seen + n])
        self.seen += n

    def forget(self) -> None:
        """Forgets everything but how many there were."""
        self._kept = self._kept[:0].copy()

    def outliers(self) -> Outliers:
        """Returns the outliers that are known, or follow from what has been seen."""
        return self.known or Outliers.of(self.values[:, len(self._watch) :], self._watch.place_of)

    def scale(self, outliers: Outliers) -> Scale:
        """Returns the scale that follows from what has been seen but outliers; 0 for what follows from nothing."""
        watch, options, n = self._watch, self._options, len(self._watch)
        scale = chosen_scale(watch, options)
        if scale is not None:
            return scale
        values = outliers.without(self.values[:, :n], self.values[:, n:])
        thresholds = watch.thresholds.numpy().copy()
        quantiles = watch.quantiles.numpy()
        for quantile in np.unique(quantiles[quantiles > 0.0]).tolist():
            some = np.flatnonzero(quantiles == quantile)
            thresholds[some] = _quantile(values[:, some], quantile)
        return Scale(thresholds, _buckets(watch, options, values), Source.FIRST_TOKENS)


def asking(watch: Watch) -> NDArray[np.bool_]:
    """Returns [W]: whether the threshold of an item is a quantile."""
    if not len(watch.quantiles):
        return np.zeros(len(watch), dtype=bool)
    asks: NDArray[np.bool_] = watch.quantiles.numpy() > 0.0
    return asks


def _quantile(values: Float32s, quantile: float) -> Floats:
    """Returns the interpolated quantile of the finite values of each column, 0 where there are none."""
    if not len(values):
        return np.zeros(values.shape[1])
    finite = np.isfinite(values)
    if finite.all():
        all_of_it: Floats = np.quantile(values, quantile, axis=0).astype(np.float64)
        return all_of_it
    ordered = np.sort(np.where(finite, values, np.inf), axis=0).astype(np.float64)
    ordered[np.isinf(ordered)] = 0.0
    last = np.maximum(finite.sum(axis=0) - 1, 0)
    at = quantile * last
    low = np.floor(at).astype(np.int64)
    below, above = (np.take_along_axis(ordered, row[None], axis=0)[0] for row in (low, np.minimum(low + 1, last)))
    found: Floats = below + (at - low) * (above - below)
    return found


def _buckets(watch: Watch, options: WatchOptions, values: NDArray[np.floating]) -> Buckets:
    if options.buckets:
        return (options.buckets,) * len(watch.kind_names)
    kind_of = watch.kind_of
    return tuple(bounds(values[:, kind_of == kind]) for kind in range(len(watch.kind_names)))


def bounds(values: NDArray[np.floating]) -> tuple[float, ...]:
    """Returns the bounds of a histogram for values like these: at least one, rounded to three digits."""
    flat = values.reshape(-1)
    flat = flat[np.isfinite(flat)]
    if not len(flat):
        return (0.0,)
    low, high = float(flat.min()), float(flat.max())
    flat = flat[:: -(-len(flat) // _MOST_VALUES)]
    spread = high - low
    found = [*np.quantile(flat, _BUCKET_QUANTILES).tolist(), high, high + spread, high + 3.0 * spread]
    if low < 0.0:
        found += [low, low - spread, low - 3.0 * spread]
    return _rounded(found)


def _rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({float(f"{number:.{_DIGITS}g}") + 0.0 for number in numbers}))
