"""The largest value of every unit over the rows of one text, and which row has it: of equal values the earlier one.

    max_r x_ri,   argmax_r x_ri        rows r counted from 0 in the order in which they come

Kept by layer: float32 [width] and int64 [width]. It is for one request.
"""

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class LargestRows(Reducer):
    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts = dict.fromkeys(layers, 0)

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        values, at = rows.float().max(0)
        at = at + self._counts[layer]
        if (before := self._kept.get(layer)) is not None:
            is_larger = values > before[0]
            values, at = torch.where(is_larger, values, before[0]), torch.where(is_larger, at, before[1])
        self._kept[layer] = values, at
        self._counts[layer] += len(rows)

    def largest(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the values and the numbers of their rows. Raises KeyError where no row has come."""
        return self._kept[layer]
