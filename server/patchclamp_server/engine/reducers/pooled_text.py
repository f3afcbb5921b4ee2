"""One text, pooled in several ways at once: what `of` makes of its rows, without its attention sinks (pooling.py).

Kept by layer and pooling until the text has ended: what a TokenPool keeps.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.interventions.pooling import Pooling, TokenPool


class PooledText(Reducer):
    """Takes one text of `tokens` tokens. `of` gives what is pooled, [n, k], of a layer and its rows [n, width]."""

    def __init__(
        self, layers: tuple[int, ...], tokens: int, poolings: Sequence[Pooling], of: Callable[[int, Tensor], Tensor]
    ) -> None:
        super().__init__(layers)
        self._pools = {
            (layer, pooling): TokenPool(pooling, (layer,), tokens, partial(of, layer))
            for layer in layers
            for pooling in poolings
        }

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        for (of_layer, _), pool in self._pools.items():
            if of_layer == layer:
                pool.add(layer, rows, place.start)

    def pooled(self, layer: int, pooling: Pooling) -> tuple[Tensor, int]:
        """Returns the pooled values float32 [k] on the CPU, and how many tokens they are of."""
        found = self._pools[layer, pooling].result().cpu()
        return found.values[0], int(found.tokens[0])
