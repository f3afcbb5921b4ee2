"""The first rows of the first texts, for what has to be computed again from them, such as a block.

    rows at positions below `tokens` of texts below `texts`

Kept by layer: the rows in their own type, on the device: texts · tokens · width values.
"""

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class Beginnings(Reducer):
    def __init__(self, layers: tuple[int, ...], texts: int, tokens: int) -> None:
        super().__init__(layers)
        self.texts, self._tokens = texts, tokens
        self._parts: dict[int, dict[tuple[int, int], Tensor]] = {layer: {} for layer in layers}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        if place.text < self.texts and place.start < self._tokens:
            self._parts[layer][place.text, place.start] = rows[: self._tokens - place.start].clone()

    def take(self, layer: int) -> Tensor:
        """Returns the rows [texts · tokens, width], by text and position, and lets them go."""
        parts = self._parts.pop(layer)
        return torch.cat([parts[key] for key in sorted(parts)])
