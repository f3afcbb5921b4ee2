"""Where heads look: what attention tells of itself in a step.

    peak_th = argmax_j softmax_j(s_thj), the lowest position of equals, and its probability

Attention has both at hand while it computes z: no attention matrix is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.interventions.scopes import IntArray


@dataclass(frozen=True, eq=False)
class LayerPeaks:
    """What attention of one layer fills in: at least `rows`, ascending. Numbers of other rows mean nothing."""

    rows: IntArray
    positions: Tensor  # int32 [T, n_heads]
    probabilities: Tensor  # float32 [T, n_heads]
    # On a CPU: the place of the layer in the two arrays [layers, T, n_heads] that the tensors are part of.
    place: int
    arrays: tuple[NDArray[Any], NDArray[Any]] | None


class Peaks:
    """Memory for the peaks of all layers that are read, so that they come to the host at once."""

    def __init__(self, rows: Mapping[int, IntArray], n_rows: int, n_heads: int, device: torch.device) -> None:
        """`rows` that are asked for at each layer, of the `n_rows` of the step."""
        shape = (len(rows), n_rows, n_heads)
        self.positions = torch.empty(shape, dtype=torch.int32, device=device)
        self.probabilities = torch.empty(shape, dtype=torch.float32, device=device)
        arrays = (self.positions.numpy(), self.probabilities.numpy()) if device.type == "cpu" else None
        self.layers = {
            layer: LayerPeaks(own, self.positions[place], self.probabilities[place], place, arrays)
            for place, (layer, own) in enumerate(rows.items())
        }

    def at(self, layer: int) -> LayerPeaks | None:
        return self.layers.get(layer)
