"""The k texts in which every unit has its largest values, each with the largest alone and where that stands.

    m_it = max over the tokens of text t of x_i;        the k largest m_it, with t and the position

Of equal values the earlier position of a text, and the earlier text, goes first, in whichever order rows come.

Kept by layer: float32 [width, k] and twice int64 [width, k]; and of each text that has not ended 12 · width bytes.
"""

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.engine.reducers.top_k import NOWHERE, Largest


class LargestOfTexts(Reducer):
    """Rows come with the token ids of their text, which tell where it ends."""

    def __init__(self, layers: tuple[int, ...], k: int) -> None:
        super().__init__(layers)
        self._k = k
        self._kept: dict[int, Largest] = {}
        # Largest value so far and its position, by layer and text.
        self._open: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        assert place.ids is not None
        values, places = rows.float().max(0)
        positions = places + place.start
        before = self._open.pop((layer, place.text), None)
        if before is not None:
            is_larger = values > before[0]
            values, positions = torch.where(is_larger, values, before[0]), torch.where(is_larger, positions, before[1])
        if place.start + len(rows) < len(place.ids):
            self._open[layer, place.text] = values, positions
        else:
            self._kept[layer] = self._with(layer, values, positions, place.text)

    def largest(self, layer: int) -> Largest:
        """[width, k], -inf and NOWHERE where fewer than k texts have come. Raises KeyError where none has ended."""
        return self._kept[layer]

    def _with(self, layer: int, values: Tensor, positions: Tensor, text: int) -> Largest:
        kept = self._kept.get(layer)
        if kept is None:
            shape = (len(values), self._k)
            nowhere = torch.full(shape, NOWHERE, dtype=torch.int64, device=values.device)
            kept = Largest(torch.full(shape, float("-inf"), device=values.device), nowhere, nowhere)
        found = torch.cat((kept.values, values[:, None]), dim=1)
        texts = torch.cat((kept.texts, torch.full_like(positions, text)[:, None]), dim=1)
        at = torch.cat((kept.positions, positions[:, None]), dim=1)
        # By value and then text: sorts that leave equal ones as they are, the last key first.
        order = texts.argsort(dim=1, stable=True)
        order = order.gather(1, found.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self._k]
        return Largest(found.gather(1, order), texts.gather(1, order), at.gather(1, order))
