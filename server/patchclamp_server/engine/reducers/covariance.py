"""Covariance of all pairs of units.

    C = Σ (x - m)(x - m)ᵀ / n,   m = Σ x / n

Every chunk of rows is centred on its own mean and joined with what came before (Chan, Golub and LeVeque 1983), so that
nothing is lost to a mean that is much larger than the deviations:

    M ← M + M' + (m' - m)(m' - m)ᵀ n n' / (n + n')

Kept by layer: float64 [width] and [width, width]: about 8 · layers · width² bytes.
"""

from dataclasses import dataclass

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


@dataclass(eq=False)
class _Moments:
    n: int
    mean: Tensor  # [width]
    scatter: Tensor  # [width, width], M


class Covariance(Reducer):
    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self._moments: dict[int, _Moments] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        x = rows.double()
        n, mean = len(x), x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred
        before = self._moments.get(layer)
        if before is None:
            self._moments[layer] = _Moments(n, mean, scatter)
            return
        total, apart = before.n + n, mean - before.mean
        before.scatter += scatter + apart.outer(apart) * (before.n * n / total)
        before.mean = before.mean + apart * (n / total)
        before.n = total

    def count(self, layer: int) -> int:
        return self._moments[layer].n

    def mean(self, layer: int) -> Tensor:
        """[width] float64. Raises KeyError where no row has come."""
        return self._moments[layer].mean

    def covariance(self, layer: int) -> Tensor:
        """[width, width] float64, over n and not n - 1."""
        return self._moments[layer].scatter / self._moments[layer].n
