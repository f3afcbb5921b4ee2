"""One text whose layers are read together: at each token the sum over layers of what `of` makes of its rows.

Kept until the text has ended: float32 [tokens, k].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class SummedLayers(Reducer):
    """Takes one text of `tokens` tokens. `of` gives what is summed, [n, k], of a layer and its rows [n, width]."""

    def __init__(self, layers: tuple[int, ...], tokens: int, of: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(layers)
        self._tokens, self._of = tokens, of
        self._sums: Tensor | None = None

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        own = self._of(layer, rows.float())
        if self._sums is None:
            self._sums = torch.zeros(self._tokens, own.shape[1], device=own.device)
        self._sums[place.start : place.start + len(own)] += own

    def sums(self) -> Tensor:
        """Returns them on the CPU, [tokens, k]. Raises ValueError where no row has come."""
        if self._sums is None:
            raise ValueError("no row has come")
        return self._sums.cpu()
