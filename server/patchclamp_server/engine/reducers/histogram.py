"""Counts of values between edges, of each unit or of all of a row together, and quantiles of them.

    counts_ib = Σ [e_b ≤ x_i < e_{b+1}],   with a bin below e_0 and one from e_last on

Kept by layer: int64 [width or 1, edges + 1]: 8 · layers · width · (edges + 1) bytes.
"""

from typing import Any

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import ByLayer, Place


class Histogram(ByLayer):
    """`edges` [m], ascending. `by_unit`: a histogram of each unit, and not one of all."""

    def __init__(self, layers: tuple[int, ...], edges: Tensor, *, by_unit: bool = True) -> None:
        super().__init__(layers)
        self.edges = edges.float()
        self._by_unit = by_unit

    def parameters(self) -> dict[str, Any]:
        return {"edges": self.edges.tolist(), "by_unit": self._by_unit}

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        shape = (width if self._by_unit else 1, len(self.edges) + 1)
        return {"counts": torch.zeros(shape, dtype=torch.int64, device=device)}

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        units, bins = kept["counts"].shape
        found = torch.bucketize(rows.float(), self.edges.to(rows.device), right=True)
        if self._by_unit:
            found = found + bins * torch.arange(units, device=rows.device)
        kept["counts"] += torch.bincount(found.flatten(), minlength=units * bins).view(units, bins)

    def counts(self, layer: int) -> Tensor:
        """[width or 1, m + 1] int64. Raises KeyError where no row has come."""
        return self._kept[layer]["counts"]

    def quantile(self, layer: int, q: float) -> Tensor:
        """[width or 1]: the edge below which a share q of the values lies, the first that has that many; +inf where
        that many are only there with those from the last edge on."""
        counts = self.counts(layer)
        reached = counts.cumsum(1)[:, :-1] >= q * counts.sum(1, keepdim=True)
        edges = torch.cat((self.edges.to(counts.device), self.edges.new_tensor([float("inf")]).to(counts.device)))
        first = torch.where(reached.any(1), reached.int().argmax(1), len(self.edges))
        return edges[first]
