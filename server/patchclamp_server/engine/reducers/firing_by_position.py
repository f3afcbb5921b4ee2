"""How often every unit fires in each part of a text: what the mutual information of firing with position is made of.

    n_b = rows at positions of bin b,   c_bi = Σ [x_i > θ] over these;   bin b of position p: ⌊p · bins / tokens⌋

or with `magnitude` Σ [|x_i| > θ].

Positions from `tokens` on belong to the last bin. Kept by layer: int64 [bins] and [bins, width]: 8 · layers · bins ·
width bytes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.reducers import loops
from patchclamp_server.engine.reducers.reducer import ByLayer, Place


class FiringByPosition(ByLayer):
    """`tokens`: of a text, such as the length of the windows of a corpus."""

    def __init__(
        self, layers: tuple[int, ...], bins: int, tokens: int, threshold: float = 0.0, *, magnitude: bool = False
    ) -> None:
        super().__init__(layers)
        self.bins, self.tokens, self.threshold, self.magnitude = bins, tokens, threshold, magnitude

    def parameters(self) -> dict[str, Any]:
        return {
            "bins": self.bins,
            "tokens": self.tokens,
            "threshold": self.threshold,
            "magnitude": self.magnitude,
        }

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "rows": torch.zeros(self.bins, dtype=torch.int64),
            "counts": torch.zeros((self.bins, width), dtype=torch.int64, device=device),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        positions = np.arange(place.start, place.start + len(rows), dtype=np.int64)
        bins = np.minimum(positions * self.bins // self.tokens, self.bins - 1)
        kept["rows"] += torch.from_numpy(np.bincount(bins, minlength=self.bins))
        rows = rows.abs() if self.magnitude else rows
        if rows.is_cpu:
            loops.count_by_bin(loops.array_of(rows), np.float32(self.threshold), bins, kept["counts"].numpy())
            return
        fired = (rows.float() > self.threshold).long()
        kept["counts"].index_add_(0, torch.from_numpy(bins).to(rows.device), fired)

    def rows(self, layer: int) -> Tensor:
        """[bins] int64: rows that have come of each bin. Raises KeyError where none has."""
        return self._kept[layer]["rows"]

    def counts(self, layer: int) -> Tensor:
        """[bins, width] int64: rows of the bin in which the unit fires."""
        return self._kept[layer]["counts"]
