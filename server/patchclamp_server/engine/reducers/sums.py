"""Count, sum and mean of every unit.

    n,   s_i = Σ f(x)_i,   mean_i = s_i / n        f: the value itself, unless told otherwise

Kept by layer: the count, and float64 [width]: 8 · layers · width bytes.
"""

from collections.abc import Callable

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class Sums(Reducer):
    """`of` gives what is summed of rows [n, width], such as their squares."""

    def __init__(self, layers: tuple[int, ...], of: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        super().__init__(layers)
        self.counts = dict.fromkeys(layers, 0)
        self._of = of
        self._sums: dict[int, Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        total = self._of(rows.double()).sum(0)
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self.counts[layer] += len(rows)

    def sum(self, layer: int) -> Tensor:
        """Returns the sums [width] float64. Raises KeyError where no row has come."""
        return self._sums[layer]

    def mean(self, layer: int) -> Tensor:
        return self._sums[layer] / self.counts[layer]
