"""The k largest values of every unit and the tokens where they stand; k = 1 is the maximum.

    values_i ≥ ...: the k largest of x_i over all rows, with the text and the position of each

Kept by layer: float32 [width, k] and twice int64 [width, k]: 20 · layers · width · k bytes. Of equal values those that
came first are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer

# Where fewer than k rows have come.
NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Largest:
    """All [width, k], the largest first; -inf and NOWHERE where fewer than k rows have come."""

    values: Tensor
    texts: Tensor
    positions: Tensor


class TopK(Reducer):
    def __init__(self, layers: tuple[int, ...], k: int = 1) -> None:
        super().__init__(layers)
        self.k = k
        self._found: dict[int, Largest] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        n, width = rows.shape
        new = rows.float().T  # [width, n]
        before = self._found.get(layer)
        if before is None:
            nowhere = torch.full((width, self.k), NOWHERE, dtype=torch.int64, device=rows.device)
            before = Largest(new.new_full((width, self.k), float("-inf")), nowhere, nowhere)
        values = torch.cat((before.values, new), dim=1)
        # Stable, so that the earlier of equal values stays the earlier.
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        texts = torch.cat((before.texts, before.texts.new_full((width, n), place.text)), dim=1)
        positions = torch.cat((before.positions, place.positions(n, rows.device).expand(width, n)), dim=1)
        self._found[layer] = Largest(*(x.gather(1, order) for x in (values, texts, positions)))

    def largest(self, layer: int) -> Largest:
        """Raises KeyError where no row has come."""
        return self._found[layer]
