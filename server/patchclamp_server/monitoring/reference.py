"""The distribution of the items of a watch over a stretch of what was served, and how far another is from it.

    edges     15 quantiles of each item: 16 bins of equal mass; bin j holds edges[j-1] < value <= edges[j]
    drift     ½ Σ_j |p_j - q_j|, the total variation distance of two distributions over the bins, 0 to 1

Equal values fall into one bin, and leave others empty: a neuron that is 0 nine times in ten has a bin of that mass. Two
stretches of n tokens of the same text differ by about sqrt(2 · 16 / π n), 0.05 at 4096, for no reason but chance.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.monitoring.tensors import checked

BINS = 16
# Of a reference that was made elsewhere.
MAX_EDGES = 64
# Values that are kept to find quantiles of: 64 MiB.
MAX_KEPT = 2**24

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reference:
    edges: Tensor  # float64 [W, k], ascending
    counts: Tensor  # int64 [W, k + 1]
    mean: Tensor  # float64 [W]
    deviation: Tensor  # float64 [W]

    def __len__(self) -> int:
        return len(self.edges)

    def tensors(self) -> dict[str, Tensor]:
        return {"edges": self.edges, "counts": self.counts, "mean": self.mean, "deviation": self.deviation}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Reference":
        """Raises InvalidArgument for what is no reference."""
        edges = checked(tensors, "edges", torch.float64, [None, None])
        n, k = edges.shape
        counts = checked(tensors, "counts", torch.int64, [n, k + 1])
        mean, deviation = (checked(tensors, name, torch.float64, [n]) for name in ("mean", "deviation"))
        if unexpected := tensors.keys() - {"edges", "counts", "mean", "deviation"}:
            raise InvalidArgument("", f"a reference has no tensors {', '.join(sorted(unexpected))}")
        if k > MAX_EDGES:
            raise InvalidArgument("", f"at most {MAX_EDGES} edges an item, got {k}")
        if not edges.numel() or bool((edges.diff(dim=1) < 0).any()) or int(counts.min()) < 0:
            raise InvalidArgument("", "edges must be ascending, and counts not negative")
        return cls(edges, counts, mean, deviation)


def total_variation(counts: Ints, reference: Ints) -> Floats:
    """[W], of counts [W, bins]. A distribution of nothing has nothing in common with any."""
    sums = np.stack((counts.sum(axis=1), reference.sum(axis=1)))
    shares = [c / np.maximum(n, 1)[:, None] for c, n in zip((counts, reference), sums, strict=True)]
    distance = 0.5 * np.abs(shares[0] - shares[1]).sum(axis=1)
    return np.where((sums == 0).any(axis=0), 1.0, distance)


class Recording:
    """Takes in the values of `tokens` tokens, and makes a reference of them.

    Quantiles and counts are of all of them while they are at most MAX_KEPT values, else of a random sample of tokens
    (Vitter 1985, algorithm R); mean and deviation are of all.
    """

    def __init__(
        self,
        n_items: int,
        tokens: int,
        on_progress: Callable[[int, int], None],
        on_done: Callable[[Reference | None], None],
    ) -> None:
        self.tokens = tokens
        self.seen = 0
        self.on_progress, self.on_done = on_progress, on_done
        self._kept = np.empty((min(tokens, max(1, MAX_KEPT // n_items)), n_items), dtype=np.float32)
        self._totals = np.zeros((3, n_items))  # values, their sum, and that of their squares
        self._random = np.random.default_rng(0)

    @property
    def left(self) -> int:
        return self.tokens - self.seen

    def add(self, values: NDArray[np.float32]) -> None:
        """values [n, W], of the next tokens, at most `left`."""
        finite = np.isfinite(values)
        good = np.where(finite, values, 0.0).astype(np.float64)
        self._totals += finite.sum(axis=0), good.sum(axis=0), (good**2).sum(axis=0)
        room = len(self._kept)
        direct = min(max(room - self.seen, 0), len(values))
        self._kept[self.seen : self.seen + direct] = values[:direct]
        number = np.arange(self.seen + direct, self.seen + len(values))
        place = self._random.integers(0, number + 1)
        for row, at in zip(values[direct:][place < room], place[place < room].tolist(), strict=True):
            self._kept[at] = row
        self.seen += len(values)

    def result(self) -> Reference:
        """Sorts all that was kept: not for a thread that others wait for."""
        kept = self._kept[: self.seen]
        n = np.isfinite(kept).sum(axis=0)
        ordered = np.sort(np.where(np.isfinite(kept), kept, np.float32(np.inf)).T, axis=1)  # [W, tokens]
        # The smallest value that at least this share is not above.
        places = np.ceil(n[:, None] * np.arange(1, BINS) / BINS).astype(np.int64) - 1
        edges = np.take_along_axis(ordered, np.maximum(places, 0), axis=1)
        edges[n == 0] = 0.0
        upto = np.stack([(ordered <= edge[:, None]).sum(axis=1) for edge in edges.T], axis=1)
        counts = np.diff(upto, axis=1, prepend=0, append=n[:, None])
        tokens, total, squares = self._totals
        mean = total / np.maximum(tokens, 1)
        deviation = np.sqrt(np.maximum(squares / np.maximum(tokens, 1) - mean**2, 0.0))
        arrays = (edges.astype(np.float64), counts.astype(np.int64), mean, deviation)
        return Reference(*(torch.from_numpy(array) for array in arrays))
