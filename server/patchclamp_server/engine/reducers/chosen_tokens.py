"""Some tokens of one text, given on to another reducer as if they were all that there is.

    rows [n, width] → rows[is_chosen]

Nothing is kept here. The other reducer must not ask where rows stand: they are not consecutive any more.
"""

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.model.arrays import BoolArray


class ChosenTokens(Reducer):
    """`is_chosen` [T]: of each token of the text, whether its rows are given on."""

    def __init__(self, is_chosen: BoolArray, into: Reducer) -> None:
        super().__init__(into.layers)
        self._is_chosen, self._into = torch.from_numpy(is_chosen), into

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        own = self._is_chosen[place.start : place.start + len(rows)]
        if bool(own.all()):
            self._into.add(layer, rows, place)
        elif bool(own.any()):
            self._into.add(layer, rows[own.to(rows.device)], place)
