"""Sum and count of every unit over the ordinary tokens of each text, without its attention sinks (pooling.py).

    s_i = Σ f(x)_i   over the tokens that are neither the first of their text nor outliers among its norms

Which tokens are outliers is known when a text has ended: until then its norms and at most MOST_LEFT_OUT of its rows are
kept at each layer. Kept of all texts by layer: the count, and float64 [width].
"""

from collections.abc import Callable

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.interventions.pooling import Pooling, TokenPool


class OrdinarySums(Reducer):
    """Takes texts of `tokens` tokens each. `of` gives what is summed of rows [n, width]."""

    def __init__(
        self, layers: tuple[int, ...], tokens: int, of: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> None:
        super().__init__(layers)
        self._tokens, self._of = tokens, of
        # These are the texts that have not ended, by layer.
        self._pools: dict[tuple[int, int], TokenPool] = {}
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        key = (place.text, layer)
        pool = self._pools.setdefault(key, TokenPool(Pooling.MEAN, (layer,), self._tokens, self._of))
        pool.add(layer, rows, place.start)
        if place.start + len(rows) < self._tokens:
            return
        found = self._pools.pop(key).result()
        total = found.values[0].double() * found.tokens[0]
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self._counts[layer] = self._counts[layer] + found.tokens[0] if layer in self._counts else found.tokens[0]

    def sum(self, layer: int) -> Tensor:
        """Returns the sums [width] float64. Raises KeyError where no text has ended."""
        return self._sums[layer]

    def count(self, layer: int) -> int:
        return int(self._counts[layer])
