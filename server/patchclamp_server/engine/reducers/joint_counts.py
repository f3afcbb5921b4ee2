"""How often two units are active together.

    c_ij = Σ [x_i > θ][x_j > θ];   c_ii: how often i is active

Kept by layer: the count of rows, and int64 [width, width]: 8 · layers · width² bytes. With `units` only those are
counted, and the width is theirs.
"""

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class JointCounts(Reducer):
    """`units` int64 [m]: which of a row; None for all."""

    def __init__(self, layers: tuple[int, ...], threshold: float = 0.0, units: Tensor | None = None) -> None:
        super().__init__(layers)
        self.rows = dict.fromkeys(layers, 0)
        self._threshold, self._units = threshold, units
        self._counts: dict[int, Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        chosen = rows if self._units is None else rows[:, self._units.to(rows.device)]
        # Exact: a chunk has far fewer rows than the 2^24 up to which float32 counts.
        active = (chosen > self._threshold).float()
        found = (active.T @ active).long()
        self._counts[layer] = self._counts[layer] + found if layer in self._counts else found
        self.rows[layer] += len(rows)

    def counts(self, layer: int) -> Tensor:
        """[width, width] int64. Raises KeyError where no row has come."""
        return self._counts[layer]
