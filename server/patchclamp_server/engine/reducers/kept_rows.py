"""All rows of one text, for a job that goes on with each text by itself.

Kept by layer: float32 [tokens, width]. It is for one request, or behind chosen_units.py.
"""

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class KeptRows(Reducer):
    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self._parts: dict[int, list[Tensor]] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        self._parts.setdefault(layer, []).append(rows.to(torch.float32, copy=True))

    def rows(self, layer: int) -> Tensor:
        """[tokens, width] float32, on the device of the rows. Raises KeyError where no row has come."""
        return torch.cat(self._parts[layer])
