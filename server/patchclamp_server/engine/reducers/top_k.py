"""The k largest values of every unit and the tokens where they stand; k = 1 is the maximum.

    values_i ≥ ...: the k largest of x_i over all rows, with the text and the position of each

Of equal values the earlier text goes first, and in a text the earlier position, in whichever order rows come. A value
is compared with the k-th so far first: of n rows in random order only about k · ln(n / k) of a unit get further.

Kept by layer: float32 [width, k] and twice int64 [width, k]: 20 · layers · width · k bytes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.engine.reducers import loops
from patchclamp_server.engine.reducers.reducer import ByLayer, Place

# Where fewer than k rows have come.
NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Largest:
    """All [width, k], the largest first; -inf and NOWHERE where fewer than k rows have come."""

    values: Tensor
    texts: Tensor
    positions: Tensor


class TopK(ByLayer):
    def __init__(self, layers: tuple[int, ...], k: int = 1) -> None:
        super().__init__(layers)
        self.k = k

    def parameters(self) -> dict[str, Any]:
        return {"k": self.k}

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        nowhere = torch.full((width, self.k), NOWHERE, dtype=torch.int64, device=device)
        return {
            "values": torch.full((width, self.k), float("-inf"), device=device),
            "texts": nowhere,
            "positions": nowhere.clone(),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        values, texts, positions = kept["values"], kept["texts"], kept["positions"]
        if rows.is_cpu:
            arrays = (values.numpy(), texts.numpy(), positions.numpy())
            loops.keep_largest(loops.array_of(rows), place.text, place.start, *arrays)
            return
        self._add_by_sorting(kept, rows, place)

    def _add_by_sorting(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        """The same with torch operators, of the units alone whose k largest may change."""
        values, x = kept["values"], rows.float()
        units = (x.amax(0) >= values[:, -1]).nonzero()[:, 0]
        if not len(units):
            return
        new = x.T[units]  # [units, n]
        shape = new.shape
        places = (
            torch.full(shape, place.text, dtype=torch.int64, device=x.device),
            place.positions(shape[1], x.device).expand(shape),
        )
        before = (kept["texts"][units], kept["positions"][units])
        both = [torch.cat(pair, dim=1) for pair in zip(before, places, strict=True)]
        found = torch.cat((values[units], new), dim=1)
        # By value and then text and then position: sorts that leave equal ones as they are, the last key first.
        order = both[1].argsort(dim=1, stable=True)
        order = order.gather(1, both[0].gather(1, order).argsort(dim=1, stable=True))
        order = order.gather(1, found.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.k]
        for name, tensor in zip(("values", "texts", "positions"), (found, *both), strict=True):
            kept[name][units] = tensor.gather(1, order)

    def largest(self, layer: int) -> Largest:
        """Raises KeyError where no row has come."""
        return Largest(**self._kept[layer])
