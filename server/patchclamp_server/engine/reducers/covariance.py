"""Covariance of all pairs of units.

    C = Σ (x - m)(x - m)ᵀ / n,   m = Σ x / n

Every chunk of rows is centred on its own mean and joined with what came before (Chan, Golub and LeVeque 1983), so that
nothing is lost to a mean that is much larger than the deviations:

    M ← M + M' + (m' - m)(m' - m)ᵀ n n' / (n + n')

Kept by layer: float64 [width] and [width, width]: about 8 · layers · width² bytes.
"""

from typing import Any

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import ByLayer, Place


class Covariance(ByLayer):
    def parameters(self) -> dict[str, Any]:
        return {}

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "rows": torch.zeros(1, dtype=torch.int64),
            "mean": torch.zeros(width, dtype=torch.float64, device=device),
            "scatter": torch.zeros((width, width), dtype=torch.float64, device=device),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        x = rows.double()
        n, mean, before = len(x), x.mean(0), int(kept["rows"])
        centred, apart, total = x - mean, mean - kept["mean"], before + len(x)
        kept["scatter"] += centred.T @ centred + apart.outer(apart) * (before * n / total)
        kept["mean"] += apart * (n / total)
        kept["rows"] += n

    def count(self, layer: int) -> int:
        return int(self._kept[layer]["rows"])

    def mean(self, layer: int) -> Tensor:
        """[width] float64. Raises KeyError where no row has come."""
        return self._kept[layer]["mean"]

    def covariance(self, layer: int) -> Tensor:
        """[width, width] float64, over n and not n - 1."""
        return self._kept[layer]["scatter"] / self.count(layer)
