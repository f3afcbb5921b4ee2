"""Mean states by label over chosen tokens of texts: of each text its own mean first.

    m_c = (1 / n_c) Σ_(texts of c) (1 / |S|) Σ_(t in S) h_t          S: the chosen tokens of the text

Kept by layer: float64 [labels, width], however many texts there are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.model.arrays import BoolArray


class ScopedMeans(Reducer):
    def __init__(self, layers: tuple[int, ...], chosen: Sequence[BoolArray], labels: Sequence[int]) -> None:
        """`chosen`: of each text a mask of its tokens, one of them at least; `labels`: of each text, from 0 on."""
        super().__init__(layers)
        self._chosen, self._labels = tuple(chosen), tuple(labels)
        self._texts = torch.bincount(torch.tensor(self._labels)).double()
        self._sums: dict[int, Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        mask = self._chosen[place.text]
        own = torch.from_numpy(mask[place.start : place.start + len(rows)]).to(rows.device)
        if layer not in self._sums:
            shape = (len(self._texts), rows.shape[1])
            self._sums[layer] = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        self._sums[layer][self._labels[place.text]] += rows[own].sum(0, dtype=torch.float64) / int(mask.sum())

    def means(self, layer: int) -> Tensor:
        """Returns [labels, width] float64, on the CPU, once every text has run."""
        return self._sums[layer].cpu() / self._texts[:, None]
