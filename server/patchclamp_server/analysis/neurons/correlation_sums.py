"""Pearson's correlation of the units of two models over the same tokens, from sums that grow with no text.

    r_ij = (S_ij - s_i t_j / n) / sqrt((S_ii - s_i² / n) (T_jj - t_j² / n))
    S_ij = Σ (x_i - a_i)(y_j - b_j),  s_i = Σ (x_i - a_i),  t_j = Σ (y_j - b_j)

x are units of the first model, y of the second. a and b are the means over the first rows that come: what is left is
small beside the deviations, so that products of float32 rows may be added in float64. A unit that never changes has no
correlation: -inf.

The control has the rows of the second model shuffled: S_ij is another, all else is the same.

Kept: float64 [n_l, m_k] for each pair of layers (l, k), twice with the control.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.engine.exclusive import Slice, Sliced

# A layer of the first model, and one of the second.
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Best:
    """Of each of n units: its largest correlation [n] float64, and the layer and column [n] int64 that it is with."""

    correlation: Tensor
    layer: Tensor
    column: Tensor


class CorrelationSums:
    """Of `pairs` of layers; `first` and `second`: how many units each layer has. `controls`: keep those of shuffled
    rows as well. Updates happen in inference mode."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        first: Mapping[int, int],
        second: Mapping[int, int],
        device: torch.device,
        *,
        controls: bool = False,
    ) -> None:
        self.pairs, self.rows = tuple(pairs), 0
        self._first = {layer: _Side(first[layer], device) for layer in {pair[0] for pair in pairs}}
        self._second = {layer: _Side(second[layer], device) for layer in {pair[1] for pair in pairs}}
        self._products = [
            {pair: torch.zeros(first[pair[0]], second[pair[1]], dtype=torch.float64, device=device) for pair in pairs}
            for _ in range(2 if controls else 1)
        ]

    def add(
        self, first: Mapping[int, Tensor], second: Mapping[int, Tensor], order: Tensor, row_products: float
    ) -> Sliced[None]:
        """Adds rows [T, n_l] and [T, m_k] of the same tokens. `order` [T] shuffles those of the control.

        `row_products`: multiplications that take as long as a row of a slice.
        """
        x = {layer: side.add(first[layer]) for layer, side in self._first.items()}
        y = {layer: side.add(second[layer]) for layer, side in self._second.items()}
        self.rows += len(order)
        for which, products in enumerate(self._products):
            for (layer, other), into in products.items():
                given = y[other] if which == 0 else y[other][order]
                # What a unit of the first model costs, in rows.
                cost = given.numel() / row_products
                done, n = 0, into.shape[0]
                while done < n:
                    granted = yield Slice(max(1, round(cost * (n - done))))
                    end = min(n, done + max(1, int(granted / cost)))
                    into[done:end] += x[layer][:, done:end].T @ given
                    done = end

    @torch.inference_mode()
    def best(self, layer: int, *, control: bool = False) -> Best:
        """Of the units of a layer of the first model, among all units of the second that it is paired with."""
        found = (self._correlations(pair, control).max(1) for pair in self.pairs if pair[0] == layer)
        return _best(found, [pair[1] for pair in self.pairs if pair[0] == layer])

    @torch.inference_mode()
    def best_of_second(self, layer: int) -> Best:
        """Of the units of a layer of the second model, among those of the first."""
        found = (self._correlations(pair, False).max(0) for pair in self.pairs if pair[1] == layer)
        return _best(found, [pair[0] for pair in self.pairs if pair[1] == layer])

    def _correlations(self, pair: Pair, control: bool) -> Tensor:
        """[n, m] float64."""
        first, second = self._first[pair[0]], self._second[pair[1]]
        r = self._products[control][pair] - first.sum[:, None] * (second.sum / self.rows)
        x, y = first.deviation(self.rows), second.deviation(self.rows)
        r /= x[:, None]
        r /= y
        r[x == 0] = -torch.inf
        r[:, y == 0] = -torch.inf
        return r


class _Side:
    """Sums of the units of one layer."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.shift: Tensor | None = None
        self.sum, self.squares = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, rows: Tensor) -> Tensor:
        """Returns the rows without the shift."""
        if self.shift is None:
            self.shift = rows.mean(0)
        x = rows - self.shift
        self.sum += x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum(0)
        return x

    def deviation(self, n: int) -> Tensor:
        """[n] float64: sqrt of the sum of squares around the mean, 0 where that is within the rounding of the rows."""
        squares = self.squares - self.sum.square() / n
        assert self.shift is not None
        rounding = n * (1e-6 * self.shift.double()).square()
        return torch.where(squares > rounding, squares, 0.0).sqrt()


def needed_bytes(pairs: Iterable[Pair], first: Mapping[int, int], second: Mapping[int, int], controls: bool) -> int:
    """What the sums take, with the correlations of one pair while they are looked at."""
    sizes = [first[layer] * second[other] for layer, other in pairs]
    return 8 * (sum(sizes) * (2 if controls else 1) + 2 * max(sizes, default=0))


def _best(found: Iterable["torch.return_types.max"], layers: Sequence[int]) -> Best:
    best: Best | None = None
    for (correlation, column), layer in zip(found, layers, strict=True):
        own = Best(correlation, torch.full_like(column, layer), column)
        if best is None:
            best = own
            continue
        is_larger = own.correlation > best.correlation
        pairs = ((own.correlation, best.correlation), (own.layer, best.layer), (own.column, best.column))
        best = Best(*(torch.where(is_larger, a, b) for a, b in pairs))
    assert best is not None
    return best
