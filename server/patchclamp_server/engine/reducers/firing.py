"""How often every unit fires.

    n,   c_i = Σ [x_i > θ]        or with `magnitude` Σ [|x_i| > θ]

Kept by layer: the count of rows and int64 [width]: 8 · layers · width bytes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.reducers import loops
from patchclamp_server.engine.reducers.reducer import ByLayer, Place


class Firing(ByLayer):
    def __init__(self, layers: tuple[int, ...], threshold: float = 0.0, *, magnitude: bool = False) -> None:
        super().__init__(layers)
        self.threshold, self.magnitude = threshold, magnitude

    def parameters(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "magnitude": self.magnitude}

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "rows": torch.zeros(1, dtype=torch.int64),
            "counts": torch.zeros(width, dtype=torch.int64, device=device),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        kept["rows"] += len(rows)
        if rows.is_cpu:
            count = loops.count_beyond if self.magnitude else loops.count_above
            count(loops.array_of(rows), np.float32(self.threshold), kept["counts"].numpy())
            return
        x = rows.float()
        kept["counts"] += ((x.abs() if self.magnitude else x) > self.threshold).sum(0)

    def count(self, layer: int) -> int:
        """Rows that have come."""
        return int(self._kept[layer]["rows"]) if layer in self._kept else 0

    def counts(self, layer: int) -> Tensor:
        """[width] int64: rows in which the unit fires. Raises KeyError where no row has come."""
        return self._kept[layer]["counts"]

    def rates(self, layer: int) -> Tensor:
        """[width] float64: the share of rows in which the unit fires."""
        return self.counts(layer).double() / self.count(layer)
