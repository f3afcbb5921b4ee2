"""Every n-th row, for what no sum can tell, such as quantiles of all values together.

    rows at positions 0, n, 2 n, ... of texts that follow each other, or of every text where their length is not said

Kept by layer: the rows in their own type, on the device: rows / n · width values, so that whoever asks for it bounds
the tokens. Rows come out in the order of texts and positions, however requests were run.
"""

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class Sample(Reducer):
    """With `tokens`, every text has so many; with 0, each text is sampled from its own beginning."""

    def __init__(self, layers: tuple[int, ...], every: int, tokens: int = 0) -> None:
        super().__init__(layers)
        self.every, self.tokens = every, tokens
        self._kept: dict[int, list[tuple[tuple[int, int], Tensor]]] = {layer: [] for layer in layers}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        first = -(place.text * self.tokens + place.start) % self.every
        if first < len(rows):
            self._kept[layer].append(((place.text, place.start), rows[first :: self.every].clone()))

    def take(self, layer: int) -> Tensor:
        """Returns the sample [n, width] and lets it go: the sample and its parts would be twice the memory."""
        kept = sorted(self._kept.pop(layer), key=lambda part: part[0])
        return torch.cat([rows for _, rows in kept])
