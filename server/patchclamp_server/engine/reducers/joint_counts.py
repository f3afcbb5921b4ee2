"""How often two units are active together.

    c_ij = Σ [x_i > θ][x_j > θ];   c_ii: how often i is active

Kept by layer: the count of rows, and int64 [width, width]: 8 · layers · width² bytes. With `units` only those are
counted, and the width is theirs; with `others` too, i is of the ones and j of the others: [units, others].
"""

from typing import Any

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import ByLayer, Place


class JointCounts(ByLayer):
    """`units` and `others` int64 [m]: which of a row; None for all, and for the same as `units`."""

    def __init__(
        self,
        layers: tuple[int, ...],
        threshold: float = 0.0,
        units: Tensor | None = None,
        others: Tensor | None = None,
    ) -> None:
        super().__init__(layers)
        self._threshold, self._units, self._others = threshold, units, others

    def parameters(self) -> dict[str, Any]:
        sets = {"units": self._units, "others": self._others}
        return {"threshold": self._threshold, **{n: None if s is None else s.tolist() for n, s in sets.items()}}

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        units = width if self._units is None else len(self._units)
        shape = (units, units if self._others is None else len(self._others))
        return {
            "rows": torch.zeros(1, dtype=torch.int64),
            "counts": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        # Exact: a chunk has far fewer rows than the 2^24 up to which float32 counts.
        active = self._active(rows, self._units)
        others = active if self._others is None else self._active(rows, self._others)
        kept["counts"] += (active.T @ others).long()
        kept["rows"] += len(rows)

    def _active(self, rows: Tensor, units: Tensor | None) -> Tensor:
        chosen = rows if units is None else rows[:, units.to(rows.device)]
        return (chosen > self._threshold).float()

    @property
    def rows(self) -> dict[int, int]:
        """By layer, how many have come."""
        return {layer: int(self._kept[layer]["rows"]) if layer in self._kept else 0 for layer in self.layers}

    def counts(self, layer: int) -> Tensor:
        """[width, width] or [units, others] int64. Raises KeyError where no row has come."""
        return self._kept[layer]["counts"]
