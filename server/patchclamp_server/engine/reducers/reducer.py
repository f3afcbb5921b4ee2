"""What every reducer is, and how the rows of one request come to it, each token once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where rows stand: token positions from `start` on of text number `text` of the job, which has the `label`."""

    text: int = 0
    start: int = 0
    label: int = 0

    def positions(self, n: int, device: torch.device) -> Tensor:
        """int64 [n]."""
        return torch.arange(self.start, self.start + n, device=device)


class Reducer(ABC):
    """Accumulates rows of many texts at `layers`, in any order of texts and layers.

    `add` is called on the engine's thread while requests run, results are read once they have finished.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    @abstractmethod
    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        """rows [n, width] of consecutive tokens, which the step goes on to change: what is kept of them is a copy."""


class Rows:
    """Rows of one request on their way to a reducer: those of tokens that are computed again are left out."""

    def __init__(self, reducer: Reducer, text: int = 0, label: int = 0) -> None:
        self.reducer, self.layers = reducer, reducer.layers
        self._text, self._label = text, label
        # Tokens that have been given, by layer.
        self._reached: dict[int, int] = {}

    def add(self, layer: int, states: Tensor, start: int) -> None:
        """states [n, width] of tokens start ≤ t < start + n. Tokens come in order, and again after a preemption."""
        reached = self._reached.get(layer, 0)
        fresh = max(start, reached)
        if fresh < start + len(states):
            self.reducer.add(layer, states[fresh - start :], Place(self._text, fresh, self._label))
            self._reached[layer] = start + len(states)
