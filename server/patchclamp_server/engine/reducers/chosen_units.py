"""Some units of each layer, given on to other reducers as if they were all that there is.

    rows [n, width] → rows[:, units]

without the first `skip` tokens of each text, as where attention has its sinks. Nothing is kept here.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer


class ChosenUnits(Reducer):
    """`units`: int64 [n] by layer; `into`: reducers of these layers, whose widths are n."""

    def __init__(self, units: Mapping[int, Tensor], into: Sequence[Reducer], *, skip: int = 0) -> None:
        super().__init__(tuple(units))
        self._units, self._into, self._skip = dict(units), tuple(into), skip

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        left_out = min(len(rows), max(0, self._skip - place.start))
        if left_out == len(rows):
            return
        if self._units[layer].device != rows.device:
            self._units[layer] = self._units[layer].to(rows.device)
        own = rows[left_out:].index_select(1, self._units[layer])
        at = Place(place.text, place.start + left_out, place.label, place.ids)
        for reducer in self._into:
            reducer.add(layer, own, at)
