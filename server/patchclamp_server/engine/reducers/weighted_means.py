"""Sums of weighted means over chosen tokens of texts: a contrast of groups of texts, however many there are.

    s_k = Σ_texts w_(text, k) (1 / |S|) Σ_(t in S) f(h_t)          S: the chosen tokens of the text

Kept by layer: float64 [k, width of f].
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.model.arrays import BoolArray


def _unchanged(layer: int, rows: Tensor) -> Tensor:
    return rows


class WeightedMeans(Reducer):
    def __init__(
        self,
        layers: tuple[int, ...],
        chosen: Sequence[BoolArray],
        weights: Tensor,
        of: Callable[[int, Tensor], Tensor] = _unchanged,
    ) -> None:
        """`chosen`: of each text a mask of its tokens, one of them at least; `weights` float64 [texts, k]; `of`: what
        is averaged of a layer and its rows [n, width]."""
        super().__init__(layers)
        self._chosen, self._weights, self._of = tuple(chosen), weights, of
        self._sums: dict[int, Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        mask = self._chosen[place.text]
        own = torch.from_numpy(np.flatnonzero(mask[place.start : place.start + len(rows)])).to(rows.device)
        if not len(own):
            return
        total = self._of(layer, rows[own]).sum(0, dtype=torch.float64) / int(mask.sum())
        weights = self._weights[place.text].to(total.device)
        if layer not in self._sums:
            self._sums[layer] = torch.zeros(len(weights), len(total), dtype=torch.float64, device=total.device)
        self._sums[layer] += weights[:, None] * total

    def sums(self, layer: int) -> Tensor:
        """Returns float64 [k, width] on the CPU, once every text has run."""
        return self._sums[layer].cpu()
