"""All rows of whole texts at a few places, until somebody takes them: for what is computed on another thread.

In memory are the rows of the texts that have not ended or have not been taken: those in flight, if they are taken as
texts end. Float32 [tokens, width] of each place.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.engine.request import Reduction
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class TextRows:
    """`rows`: float32 [tokens, width] on the CPU at each place; `ids`: int64 [tokens]."""

    label: int
    ids: IntArray
    rows: tuple[Tensor, ...]


class WholeTexts:
    """`reductions` are given to the engine with every text; texts are taken in the order in which they end."""

    def __init__(self, places: Sequence[tuple[Site, int]]) -> None:
        self.reductions = tuple(
            Reduction(site, _RowsAt(self, number, layer)) for number, (site, layer) in enumerate(places)
        )
        self._lock = threading.Lock()
        # By text: the parts of each place, with the token of the first row.
        self._parts: dict[int, list[list[tuple[int, Tensor]]]] = {}
        self._ended: list[TextRows] = []

    def take(self) -> list[TextRows]:
        """Returns the texts that have ended since the last time."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def add(self, number: int, rows: Tensor, place: Place) -> None:
        assert place.ids is not None
        copy = rows.to("cpu", torch.float32, copy=True)
        with self._lock:
            parts = self._parts.setdefault(place.text, [[] for _ in self.reductions])
            parts[number].append((place.start, copy))
            if all(sum(len(part) for _, part in each) == len(place.ids) for each in parts):
                del self._parts[place.text]
                together = tuple(torch.cat([part for _, part in sorted(each, key=lambda p: p[0])]) for each in parts)
                self._ended.append(TextRows(place.label, place.ids, together))


class _RowsAt(Reducer):
    def __init__(self, texts: WholeTexts, number: int, layer: int) -> None:
        super().__init__((layer,))
        self._texts, self._number = texts, number

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        self._texts.add(self._number, rows, place)
