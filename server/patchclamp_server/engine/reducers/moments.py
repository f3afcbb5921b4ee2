"""Mean, variance and maximum of every unit.

    n,   s_i = Σ x_i,   q_i = Σ x_i²,   max_i;        mean_i = s_i / n,   variance_i = q_i / n - mean_i²

Sums are of float64, so that with n rows the relative error of each is at most about n · 1e-16, in whichever order rows
come. Where the mean is far larger than the deviation, covariance.py loses less.

Kept by layer: the count, float64 [width] twice and float32 [width]: 20 · layers · width bytes.
"""

from typing import Any

import torch
from torch import Tensor

from patchclamp_server.engine.reducers import loops
from patchclamp_server.engine.reducers.reducer import ByLayer, Place


class Moments(ByLayer):
    def parameters(self) -> dict[str, Any]:
        return {}

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "rows": torch.zeros(1, dtype=torch.int64),
            "sum": torch.zeros(width, dtype=torch.float64, device=device),
            "squares": torch.zeros(width, dtype=torch.float64, device=device),
            "largest": torch.full((width,), float("-inf"), device=device),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        kept["rows"] += len(rows)
        total, squares, largest = kept["sum"], kept["squares"], kept["largest"]
        if rows.is_cpu:
            loops.add_moments(loops.array_of(rows), total.numpy(), squares.numpy(), largest.numpy())
            return
        x = rows.double()
        total += x.sum(0)
        squares += x.square().sum(0)
        torch.maximum(largest, rows.float().amax(0), out=largest)

    def count(self, layer: int) -> int:
        """Rows that have come."""
        return int(self._kept[layer]["rows"]) if layer in self._kept else 0

    def sum(self, layer: int) -> Tensor:
        """[width] float64. Raises KeyError where no row has come, as all below."""
        return self._kept[layer]["sum"]

    def squares(self, layer: int) -> Tensor:
        """[width] float64: the sums of squares."""
        return self._kept[layer]["squares"]

    def largest(self, layer: int) -> Tensor:
        """[width] float32."""
        return self._kept[layer]["largest"]

    def mean(self, layer: int) -> Tensor:
        return self.sum(layer) / self.count(layer)

    def variance(self, layer: int) -> Tensor:
        """[width] float64, over n and not n - 1; never negative."""
        return (self.squares(layer) / self.count(layer) - self.mean(layer).square()).clamp_min(0)
