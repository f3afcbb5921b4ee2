"""An accumulator adds up the statistics of the items of a watch where the model runs.

    fired += v > threshold,  positive += max(v, 0),  negative += max(-v, 0),  total_squares += v²,  min, max,
    histogram[#{edges < v}] += 1

v are float32; sums are float64 and bins int64, so that a watch can run for months. Positive and negative values are
added up apart, so that neither sum ever falls: as counters in Prometheus they give means over any time. A value that is
not finite counts in `not_finite` only, and a value at a token that is an outlier (outliers.py) in `left_out` only. On a
CPU many rows go through one loop that numba compiles; elsewhere they go through a few torch operators, and nothing is
copied to the host before somebody reads.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="no-untyped-call, no-untyped-def"

from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.monitoring.arrays import Floats, Ints, floor32
from patchclamp_server.monitoring.outliers import Outliers
from patchclamp_server.monitoring.ring import Columns
from patchclamp_server.monitoring.scale import Scale, Source


@dataclass(frozen=True, eq=False)
class Sums:
    """The sums over W items, as numpy arrays or as tensors."""

    tokens: Any  # [W]
    fired: Any
    not_finite: Any
    left_out: Any
    positive: Any
    negative: Any
    total_squares: Any
    min: Any
    max: Any
    histogram: Any  # [W, k + 1], over the edges in use
    bucket_counts: Any  # [kinds, buckets + 1]

    @classmethod
    def zero(cls, n_items: int, bins: int, kinds: int) -> "Sums":
        return cls(
            tokens=np.zeros(n_items, dtype=np.int64),
            fired=np.zeros(n_items, dtype=np.int64),
            not_finite=np.zeros(n_items, dtype=np.int64),
            left_out=np.zeros(n_items, dtype=np.int64),
            positive=np.zeros(n_items),
            negative=np.zeros(n_items),
            total_squares=np.zeros(n_items),
            min=np.full(n_items, np.inf),
            max=np.full(n_items, -np.inf),
            histogram=np.zeros((n_items, bins), dtype=np.int64),
            bucket_counts=np.zeros((kinds, bins), dtype=np.int64),
        )

    def on(self, device: torch.device) -> "Sums":
        return Sums(*(torch.from_numpy(array).to(device) for array in self.values()))

    def values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def read(self) -> "Sums":
        """Returns a copy on the host."""
        return Sums(*(_copied(v) for v in self.values()))


class Accumulator:
    """`edges` [W, k] are the bin edges of the items: the buckets of their kind, until there is a reference. `kind_of`
    [W] tells which of the scale's buckets belong to an item."""

    def __init__(
        self, scale: Scale, outliers: Outliers, kind_of: Ints, device: torch.device, *, compiled: bool
    ) -> None:
        self.device, self.compiled = device, compiled
        self.scale, self.outliers, self._kind_of = scale, outliers, kind_of
        # Shorter lists of bounds are padded with infinity, beyond which there is no value.
        buckets = np.full((len(scale.buckets), max(map(len, scale.buckets))), np.inf)
        for own, bounds in zip(buckets, scale.buckets, strict=True):
            own[: len(bounds)] = bounds
        self._thresholds = floor32(scale.thresholds)
        self._buckets = floor32(buckets)
        self.edges = buckets[kind_of]
        self._rounded = floor32(self.edges)
        self.own_edges = False
        sums = Sums.zero(len(kind_of), buckets.shape[1] + 1, len(buckets))
        self.sums = sums if self.compiled else sums.on(device)
        self._constants = self._placed()

    def on(self, device: torch.device, *, compiled: bool) -> "Accumulator":
        """Moves to another device with what has been counted, before there are edges of a reference."""
        moved = Accumulator(self.scale, self.outliers, self._kind_of, device, compiled=compiled)
        moved.sums = self.sums if compiled else self.sums.on(device)
        return moved

    def set_outliers(self, outliers: Outliers) -> None:
        """Leaves these out from now on; what has been counted stays."""
        self.outliers = outliers
        self._constants = self._placed()

    # The engine's thread makes tensors that other threads update in place, which only inference mode allows.
    @torch.inference_mode()
    def set_edges(self, edges: Floats) -> None:
        """Counts the histogram by these edges from now on; what the buckets have counted stays."""
        if not self.own_edges:
            counted = _by_kind(_copied(self.sums.histogram), self._kind_of, len(self._buckets))
            self.sums.bucket_counts[:] += counted if self.compiled else torch.from_numpy(counted).to(self.device)
        self.own_edges = True
        self.edges, self._rounded = edges, floor32(edges)
        empty = np.zeros((len(edges), edges.shape[1] + 1), dtype=np.int64)
        arrays = self.sums.values()
        arrays[-2] = empty if self.compiled else torch.from_numpy(empty).to(self.device)
        self.sums = Sums(*arrays)
        self._constants = self._placed()

    def _placed(self) -> tuple[Tensor, ...]:
        # This is where the bins of an item's kind begin in the flat bucket counts.
        first = self._kind_of[:, None] * (self._buckets.shape[1] + 1)
        limits = self.outliers.limits
        arrays = (self._thresholds, self._rounded, self._buckets[self._kind_of], first, limits)
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def add(self, values: Any, rows: Ints, columns: Columns) -> None:
        """Adds rows of a ring's values. Item w of row r is values[rows[r], columns.items[w]], and the norm of its place
        is values[rows[r], columns.norms[w]]."""
        if self.compiled:
            count_buckets = self.own_edges
            constants = (self._thresholds, self._rounded, self._buckets, self._kind_of, count_buckets)
            _add(values, rows, columns.items, columns.norms, self.outliers.limits, *constants, *self.sums.values())
        else:
            index = (torch.from_numpy(array).to(self.device) for array in (rows, columns.items, columns.norms))
            own = values.index_select(0, next(index))
            self._add_on_device(own.index_select(1, next(index)), own.index_select(1, next(index)))

    @torch.inference_mode()
    def _add_on_device(self, values: Tensor, norms: Tensor) -> None:
        """Adds values and norms, both [n, W]."""
        thresholds, edges, buckets, first, limits = self._constants
        sums = self.sums
        kept = ~((norms > limits) & torch.isfinite(norms))
        finite = torch.isfinite(values) & kept
        good = torch.where(finite, values, 0.0).double()
        sums.tokens.add_(finite.sum(0))
        sums.fired.add_(((values > thresholds) & finite).sum(0))
        sums.not_finite.add_((kept & ~finite).sum(0))
        sums.left_out.add_((~kept).sum(0))
        sums.positive.add_(good.clamp_min(0.0).sum(0))
        sums.negative.sub_(good.clamp_max(0.0).sum(0))
        sums.total_squares.add_((good * good).sum(0))
        torch.minimum(sums.min, torch.where(finite, good, torch.inf).amin(0), out=sums.min)
        torch.maximum(sums.max, torch.where(finite, good, -torch.inf).amax(0), out=sums.max)
        turned, counted = values.t().contiguous(), finite.t().long()
        sums.histogram.scatter_add_(1, torch.searchsorted(edges, turned), counted)
        if self.own_edges:
            bins = first + torch.searchsorted(buckets, turned)
            sums.bucket_counts.view(-1).scatter_add_(0, bins.reshape(-1), counted.reshape(-1))

    def read(self) -> Sums:
        """Returns a copy on the host, whose bucket counts include all tokens."""
        sums = self.sums.read()
        if not self.own_edges:
            sums.bucket_counts[:] += _by_kind(sums.histogram, self._kind_of, len(self._buckets))
        return sums

    def histogram(self) -> Ints:
        """Returns a copy on the host."""
        copied: Ints = _copied(self.sums.histogram)
        return copied


def _by_kind(histogram: Ints, kind_of: Ints, kinds: int) -> Ints:
    """Sums the histograms of items by kind: [kinds, bins]."""
    counts = np.zeros((kinds, histogram.shape[1]), dtype=np.int64)
    np.add.at(counts, kind_of, histogram)
    return counts


def _copied(values: Any) -> Any:
    """Copies values to the host."""
    return values.cpu().clone().numpy() if isinstance(values, Tensor) else values.copy()


def warm_up() -> None:
    """Compiles what `add` runs on a CPU, or reads it from the disk."""
    for own in (False, True):
        index = np.zeros(1, dtype=np.int64)
        scale = Scale(np.zeros(1), ((0.0,),), Source.CHOSEN)
        accumulator = Accumulator(scale, Outliers.none(1), index, torch.device("cpu"), compiled=True)
        if own:
            accumulator.set_edges(np.zeros((1, 1)))
        accumulator.add(np.zeros((1, 1), dtype=np.float32), index, Columns.of(index, index[:0], index - 1))


@numba.njit(nogil=True, cache=True)
def _add(
    values,
    rows,
    columns,
    norms,
    limits,
    thresholds,
    edges,
    buckets,
    kind_of,
    count_buckets,
    tokens,
    fired,
    not_finite,
    left_out,
    positive,
    negative,
    total_squares,
    low,
    high,
    histogram,
    bucket_counts,
):
    k, n_buckets = edges.shape[1], buckets.shape[1]
    kept, n_kept = np.empty(rows.shape[0], dtype=np.int64), 0
    for item in range(columns.shape[0]):
        # Neighbours are mostly at one place, where the same rows are left out.
        if item == 0 or norms[item] != norms[item - 1] or limits[item] != limits[item - 1]:
            n_kept = 0
            for row in rows:
                if not limits[item] < values[row, norms[item]] < np.inf:
                    kept[n_kept] = row
                    n_kept += 1
        column, threshold, kind = columns[item], thresholds[item], kind_of[item]
        n, above, broken = 0, 0, 0
        up, down, squares = 0.0, 0.0, 0.0
        least, most = np.float32(np.inf), np.float32(-np.inf)
        for i in range(n_kept):
            v = values[kept[i], column]
            if not abs(v) < np.inf:
                broken += 1
                continue
            n += 1
            above += v > threshold
            up += max(v, np.float32(0))
            down -= min(v, np.float32(0))
            squares += np.float64(v) * np.float64(v)
            least, most = min(least, v), max(most, v)
            # Counting all edges takes a vector instruction or two; a search would be a chain of jumps.
            place = np.int32(0)
            for j in range(k):
                place += np.int32(edges[item, j] < v)
            histogram[item, place] += 1
            if count_buckets:
                place = np.int32(0)
                for j in range(n_buckets):
                    place += np.int32(buckets[kind, j] < v)
                bucket_counts[kind, place] += 1
        tokens[item] += n
        fired[item] += above
        not_finite[item] += broken
        left_out[item] += rows.shape[0] - n_kept
        positive[item] += up
        negative[item] += down
        total_squares[item] += squares
        low[item], high[item] = min(low[item], least), max(high[item], most)
