"""A reference is the distribution of the items of a watch over a stretch of what was served.

    edges      15 quantiles of each item: 16 bins of equal mass; bin j holds edges[j-1] < value <= edges[j]
    levels     quantiles of each item at LEVELS, which thresholds and buckets follow from (scale.py)
    inflation  D = max(1, Σ_bj (c_bj - n_b p_j)² / (n_b p_j) / ((B - 1) (bins - 1))): how much more the counts c of
               B = 8 stretches vary than those of independent tokens; the tokens of one text are alike (the design
               effect of cluster samples: Rao and Scott 1981)
    norms      of each item the median norm of the rows at its site and layer, by which outliers were left out of all of
               this (outliers.py), and by which a watch with this reference leaves them out too

Equal values fall into one bin, and leave others empty: a neuron that is 0 nine times in ten has a bin of that mass.
drift.py tells how far another distribution is from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.monitoring.arrays import Float32s, Floats, Ints
from patchclamp_server.monitoring.outliers import Outliers
from patchclamp_server.monitoring.tensors import checked

BINS = 16
# A reference that was made elsewhere may have more edges than ours, up to this.
MAX_EDGES = 64
# These are the probabilities of the quantiles that are kept, including the least and the largest value.
LEVELS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
# The inflation is found from so many stretches, each of at least so many tokens.
_STRETCHES, _SHORTEST = 8, 16
# So many values are kept to find quantiles of: 64 MiB.
MAX_KEPT = 2**24


@dataclass(frozen=True, eq=False)
class Reference:
    edges: Tensor  # float64 [W, k], ascending
    counts: Tensor  # int64 [W, k + 1]
    mean: Tensor  # float64 [W]
    deviation: Tensor  # float64 [W]
    # These are None in references that were recorded before there were any.
    levels: Tensor | None = None  # float64 [W, LEVELS]
    inflation: Tensor | None = None  # float64 [W], at least 1
    norms: Tensor | None = None  # float64 [W], 0 where nothing is left out

    def __len__(self) -> int:
        return len(self.edges)

    def tensors(self) -> dict[str, Tensor]:
        named = {"edges": self.edges, "counts": self.counts, "mean": self.mean, "deviation": self.deviation}
        more = {"levels": self.levels, "inflation": self.inflation, "norms": self.norms}
        return named | {name: tensor for name, tensor in more.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Reference":
        """Raises InvalidArgument for tensors that are not a reference."""
        edges = checked(tensors, "edges", torch.float64, [None, None])
        n, k = edges.shape
        counts = checked(tensors, "counts", torch.int64, [n, k + 1])
        mean, deviation = (checked(tensors, name, torch.float64, [n]) for name in ("mean", "deviation"))
        levels = inflation = norms = None
        if "levels" in tensors:
            levels = checked(tensors, "levels", torch.float64, [n, len(LEVELS)])
        if "inflation" in tensors:
            inflation = checked(tensors, "inflation", torch.float64, [n])
        if "norms" in tensors:
            norms = checked(tensors, "norms", torch.float64, [n])
        known = {"edges", "counts", "mean", "deviation", "levels", "inflation", "norms"}
        if unexpected := tensors.keys() - known:
            raise InvalidArgument("", f"a reference has no tensors {', '.join(sorted(unexpected))}")
        if k > MAX_EDGES:
            raise InvalidArgument("", f"at most {MAX_EDGES} edges an item, got {k}")
        if not edges.numel() or bool((edges.diff(dim=1) < 0).any()) or int(counts.min()) < 0:
            raise InvalidArgument("", "edges must be ascending, and counts not negative")
        if levels is not None and bool((levels.diff(dim=1) < 0).any()):
            raise InvalidArgument("", "levels must be ascending")
        if inflation is not None and float(inflation.min()) < 1.0:
            raise InvalidArgument("", "inflation must be at least 1")
        if norms is not None and float(norms.min()) < 0.0:
            raise InvalidArgument("", "norms must not be negative")
        return cls(edges, counts, mean, deviation, levels, inflation, norms)


class Recording:
    """Collects the values of `tokens` tokens, and makes a reference of all but the outliers.

    Quantiles and counts are over all of them up to MAX_KEPT values, else over a random sample of tokens (Vitter 1985,
    algorithm R); mean and deviation are over all. Tokens wait until it is known what is an outlier.
    """

    def __init__(
        self,
        n_items: int,
        tokens: int,
        on_progress: Callable[[int, int], None],
        on_done: Callable[[Reference | None], None],
        outliers: Outliers | None = None,
    ) -> None:
        """`outliers` are left out; where they are not known, `find_outliers` finds them."""
        self.tokens = tokens
        self.seen = 0
        self.on_progress, self.on_done = on_progress, on_done
        self.outliers = outliers
        # These are values and norms.
        self._waiting: list[tuple[Float32s, Float32s]] = []
        self._taken = 0
        self._kept = np.empty((min(tokens, max(1, MAX_KEPT // n_items)), n_items), dtype=np.float32)
        self._totals = np.zeros((3, n_items))  # values, their sum, and that of their squares
        self._random = np.random.default_rng(0)

    @property
    def left(self) -> int:
        return self.tokens - self.seen

    def add(self, values: Float32s, norms: Float32s) -> None:
        """Adds values [n, W] and norms [n, places] of the next tokens, at most `left`."""
        self.seen += len(values)
        if self.outliers is None:
            self._waiting.append((values, norms))
        else:
            self._take(self.outliers.without(values, norms))

    def find_outliers(self, place_of: Ints) -> None:
        """Finds outliers among the tokens that wait, if they are not known yet. place_of [W] is as in Outliers."""
        if self.outliers is not None:
            return
        self.outliers = Outliers.of(np.concatenate([norms for _, norms in self._waiting]), place_of)
        for values, norms in self._waiting:
            self._take(self.outliers.without(values, norms))
        self._waiting = []

    def _take(self, values: Float32s) -> None:
        finite = np.isfinite(values)
        good = np.where(finite, values, 0.0).astype(np.float64)
        self._totals += finite.sum(axis=0), good.sum(axis=0), (good**2).sum(axis=0)
        room = len(self._kept)
        direct = min(max(room - self._taken, 0), len(values))
        self._kept[self._taken : self._taken + direct] = values[:direct]
        number = np.arange(self._taken + direct, self._taken + len(values))
        place = self._random.integers(0, number + 1)
        for row, at in zip(values[direct:][place < room], place[place < room].tolist(), strict=True):
            self._kept[at] = row
        self._taken += len(values)

    def result(self) -> Reference:
        """Sorts all that was kept, so not on a thread that others wait for. Outliers must be known."""
        assert self.outliers is not None
        kept = self._kept[: self.seen]
        n = np.isfinite(kept).sum(axis=0)
        ordered = np.sort(np.where(np.isfinite(kept), kept, np.float32(np.inf)).T, axis=1)  # [W, tokens]
        # This is the smallest value that at least this share of values does not exceed.
        places = np.ceil(n[:, None] * np.arange(1, BINS) / BINS).astype(np.int64) - 1
        edges = np.take_along_axis(ordered, np.maximum(places, 0), axis=1)
        edges[n == 0] = 0.0
        upto = np.stack([(ordered <= edge[:, None]).sum(axis=1) for edge in edges.T], axis=1)
        counts = np.diff(upto, axis=1, prepend=0, append=n[:, None])
        tokens, total, squares = self._totals
        mean = total / np.maximum(tokens, 1)
        deviation = np.sqrt(np.maximum(squares / np.maximum(tokens, 1) - mean**2, 0.0))
        at = np.ceil(n[:, None] * np.array(LEVELS)).astype(np.int64) - 1
        levels = np.take_along_axis(ordered, np.maximum(at, 0), axis=1).astype(np.float64)
        levels[n == 0] = 0.0
        inflation = _inflation(kept, edges, counts) if self.seen <= len(self._kept) else np.ones(len(n))
        norms = self.outliers.norms
        arrays = (edges.astype(np.float64), counts.astype(np.int64), mean, deviation, levels, inflation, norms)
        return Reference(*(torch.from_numpy(array) for array in arrays))


def _inflation(values: Float32s, edges: Float32s, counts: Ints) -> Floats:
    """Returns D [W] of values [n, W] in their order. A random sample of tokens has no order, so D would be 1."""
    stretches = min(_STRETCHES, len(values) // _SHORTEST)
    if stretches < 2:
        return np.ones(len(edges))
    share = counts / np.maximum(counts.sum(axis=1), 1)[:, None]  # [W, bins]
    used = share > 0
    squares = np.zeros(len(edges))
    for part in np.array_split(values, stretches):
        finite = np.isfinite(part)
        upto = np.stack([((part <= edge) & finite).sum(axis=0) for edge in edges.T], axis=1)
        n = finite.sum(axis=0)[:, None]
        found = np.diff(upto, axis=1, prepend=0, append=n)
        expected = n * share
        squares += np.where(used, (found - expected) ** 2 / np.where(expected > 0, expected, 1.0), 0.0).sum(axis=1)
    free = (stretches - 1) * np.maximum(used.sum(axis=1) - 1, 1)
    inflation: Floats = np.maximum(squares / free, 1.0)
    return inflation
