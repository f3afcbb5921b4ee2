"""The norm of every token of each text: by which attention sinks are told from other tokens (pooling.py).

    ‖h_t‖

Kept by layer: float32 [tokens] of all texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class TokenNorms(Reducer):
    def __init__(self, layers: tuple[int, ...], lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each text."""
        super().__init__(layers)
        self._lengths = tuple(lengths)
        self._norms: dict[tuple[int, int], Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        key = (layer, place.text)
        if key not in self._norms:
            self._norms[key] = torch.zeros(self._lengths[place.text], device=rows.device)
        self._norms[key][place.start : place.start + len(rows)] = rows.float().norm(dim=1)

    def of(self, layer: int, text: int) -> Tensor:
        """Returns float32 [tokens] on the CPU, once the text has run."""
        return self._norms[layer, text].cpu()
