"""One reducer for each label of the texts: a statistic by language, by class or by side of a contrast.

    firing probability of a unit by language: PerLabel(layers, labels, partial(Firing, layers))

Kept: what a reducer keeps, times the labels that came; `labels` bounds them. Texts without a label are left out.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.engine.reducers.reducer import Place, Reducer, Resumable

R = TypeVar("R", bound=Reducer)


class PerLabel(Resumable, Generic[R]):
    """`make`: the reducer of a label. Labels are 0 to `labels` - 1. It can be resumed where those of the labels can."""

    def __init__(self, layers: tuple[int, ...], labels: int, make: Callable[[], R]) -> None:
        super().__init__(layers)
        self.of = [make() for _ in range(labels)]

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        if place.label != UNLABELLED:
            self.of[place.label].add(layer, rows, place)

    def parameters(self) -> dict[str, Any]:
        each = [(type(reducer).__name__, reducer.parameters()) for reducer in self._resumable()]
        return {"labels": len(self.of), "each": each}

    def state(self) -> dict[str, Tensor]:
        states = (reducer.state() for reducer in self._resumable())
        return {f"{label}.{name}": tensor for label, state in enumerate(states) for name, tensor in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        by_label: dict[str, dict[str, Tensor]] = {str(label): {} for label in range(len(self.of))}
        for path, tensor in state.items():
            label, _, name = path.partition(".")
            if label not in by_label:
                raise ValueError(f"{path} is of no label below {len(self.of)}")
            by_label[label][name] = tensor
        for reducer, own in zip(self._resumable(), by_label.values(), strict=True):
            reducer.restore(own)

    def _resumable(self) -> list[Resumable]:
        found: list[Resumable] = [reducer for reducer in self.of if isinstance(reducer, Resumable)]
        assert len(found) == len(self.of), "the reducers of the labels cannot be resumed"
        return found
