"""The peak of a head is the position that it attends to most; attention reports it in a step.

    peak_th     = argmax_j softmax_j(s_thj), the lowest position of equals, and its probability
    off_sink_th = max_{j > 0} softmax_j(s_thj), 0 where a row sees no key but that of position 0

Attention knows all of this while it computes z, so no attention matrix is kept. A head that has nothing to do attends
to the first token (the attention sink: Xiao et al. 2024); its peak is then near 1, and says nothing. Off the sink the
probabilities are still those of the whole softmax, so that a head at rest is near 0.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.model.arrays import IntArray


@dataclass(frozen=True, eq=False)
class LayerPeaks:
    """Attention of one layer fills these in, at least for `rows`, ascending. Values of other rows mean nothing."""

    rows: IntArray
    positions: Tensor  # int32 [T, n_heads]
    probabilities: Tensor  # float32 [T, n_heads]
    off_sink: Tensor | None  # float32 [T, n_heads], where it is asked for
    # On a CPU, this is the layer's index in the arrays [layers, T, n_heads] that the tensors are part of.
    place: int
    arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None] | None


class Peaks:
    """Holds the peaks of all layers that are read in one memory, so that they are copied to the host at once."""

    def __init__(
        self,
        rows: Mapping[int, IntArray],
        n_rows: int,
        n_heads: int,
        device: torch.device,
        *,
        off_sink: bool = False,
    ) -> None:
        """`rows` has the rows that are asked for at each layer, of the `n_rows` of the step."""
        shape = (len(rows), n_rows, n_heads)
        self.positions = torch.empty(shape, dtype=torch.int32, device=device)
        self.probabilities = torch.empty(shape, dtype=torch.float32, device=device)
        self.off_sink = torch.empty(shape, dtype=torch.float32, device=device) if off_sink else None
        self.layers = self._layers(rows)

    def with_off_sink(self) -> "Peaks":
        """Returns peaks with the same memory, and with memory for the values off the sink."""
        more = copy(self)
        more.off_sink = torch.empty_like(self.probabilities)
        more.layers = more._layers({layer: own.rows for layer, own in self.layers.items()})
        return more

    def _layers(self, rows: Mapping[int, IntArray]) -> dict[int, LayerPeaks]:
        off_sink, arrays = self.off_sink, None
        if self.positions.device.type == "cpu":
            off = None if off_sink is None else off_sink.numpy()
            arrays = self.positions.numpy(), self.probabilities.numpy(), off
        return {
            layer: LayerPeaks(
                own,
                self.positions[place],
                self.probabilities[place],
                None if off_sink is None else off_sink[place],
                place,
                arrays,
            )
            for place, (layer, own) in enumerate(rows.items())
        }

    def at(self, layer: int) -> LayerPeaks | None:
        return self.layers.get(layer)
