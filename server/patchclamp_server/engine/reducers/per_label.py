"""One reducer for each label of the texts: a statistic by language, by class or by side of a contrast.

Kept: what a reducer keeps, times the labels that came; `labels` bounds them.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Reducer

R = TypeVar("R", bound=Reducer)


class PerLabel(Reducer, Generic[R]):
    """`make`: the reducer of a label. Labels are 0 to `labels` - 1."""

    def __init__(self, layers: tuple[int, ...], labels: int, make: Callable[[], R]) -> None:
        super().__init__(layers)
        self.of = [make() for _ in range(labels)]

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        self.of[place.label].add(layer, rows, place)
