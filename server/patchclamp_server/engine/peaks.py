"""Where heads look: what attention tells of itself in a step.

    peak_th = argmax_j softmax_j(s_thj), the lowest position of equals, and its probability

Attention has both at hand while it computes z: no attention matrix is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.interventions.scopes import IntArray


@dataclass(frozen=True, eq=False)
class Peaks:
    """Memory for the peaks of all layers that are read, so that they come to the host at once.

    Attention fills in the rows that are asked for, and may fill in others: their numbers mean nothing.
    """

    # Layer -> its place in the tensors.
    layers: Mapping[int, int]
    # Layer -> rows that are asked for, ascending.
    rows: Mapping[int, IntArray]
    positions: Tensor  # int32 [layers, T, n_heads]
    probabilities: Tensor  # float32 [layers, T, n_heads]

    @classmethod
    def of(cls, rows: Mapping[int, IntArray], n_rows: int, n_heads: int, device: torch.device) -> "Peaks":
        shape = (len(rows), n_rows, n_heads)
        return cls(
            {layer: i for i, layer in enumerate(rows)},
            rows,
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    @cached_property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Both tensors, which are on the CPU, as arrays on their memory."""
        return self.positions.numpy(), self.probabilities.numpy()

    def at(self, layer: int) -> "LayerPeaks | None":
        place = self.layers.get(layer)
        return None if place is None else LayerPeaks(self, layer, place)


@dataclass(frozen=True, eq=False)
class LayerPeaks:
    """What attention of one layer fills in."""

    whole: Peaks
    layer: int
    place: int

    @property
    def rows(self) -> IntArray:
        return self.whole.rows[self.layer]

    @property
    def positions(self) -> Tensor:  # int32 [T, n_heads]
        return self.whole.positions[self.place]

    @property
    def probabilities(self) -> Tensor:  # float32 [T, n_heads]
        return self.whole.probabilities[self.place]
