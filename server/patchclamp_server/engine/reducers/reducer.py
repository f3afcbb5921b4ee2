"""What every reducer is, and how the rows of one request come to it, each token once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.model.arrays import IntArray


@dataclass(frozen=True, eq=False)
class Place:
    """Where rows stand: token positions from `start` on of text number `text` of the job, which has the `label`,
    or UNLABELLED (artifacts/corpora.py).

    `ids`: int64, the token ids of the whole text; None where the rows are not those of a request.
    """

    text: int = 0
    start: int = 0
    label: int = 0
    ids: IntArray | None = None

    def positions(self, n: int, device: torch.device) -> Tensor:
        """int64 [n]."""
        return torch.arange(self.start, self.start + n, device=device)

    def tokens(self, n: int, *, before: int = 0) -> IntArray:
        """int64 [n], the ids of the rows; with `before`, those of as many tokens in front of them too, as far as the
        text has them."""
        assert self.ids is not None
        return self.ids[max(0, self.start - before) : self.start + n]


class Reducer(ABC):
    """Accumulates rows of many texts at `layers`, in any order of texts and layers.

    `add` is called on the engine's thread while requests run, results are read once they have finished.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    @abstractmethod
    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        """rows [n, width] of consecutive tokens, which the step goes on to change: what is kept of them is a copy."""


class Resumable(Reducer):
    """A reducer whose state can be written down between two texts and taken up again, by another process too."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What it was made with, as JSON: states of equal class, layers and parameters fit each other."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that it has accumulated, by name: copies on the CPU of the types that safetensors knows."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state` of one that was made alike gave, instead of what it has; an empty one: begins anew.

        ValueError: it is not that."""


class ByLayer(Resumable):
    """Keeps tensors by name for each layer, made when the first rows of the layer come, on their device.

    A subclass says with `_begin` what is kept of rows of a width, and adds rows to that in place with `_add`.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self._kept: dict[int, dict[str, Tensor]] = {}
        # Layers whose tensors were restored, and are on the CPU until rows come.
        self._restored: set[int] = set()

    @abstractmethod
    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors before any row; names and types do not depend on the width."""

    @abstractmethod
    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        """rows [n, width], n ≥ 1. Changes nothing but `kept`."""

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        if layer not in self._kept or layer in self._restored:
            begun = self._begin(rows.shape[1], rows.device)
            if layer in self._restored:
                for name, tensor in begun.items():
                    tensor.copy_(self._kept[layer][name])
                self._restored.remove(layer)
            self._kept[layer] = begun
        self._add(self._kept[layer], rows, place)

    @property
    def kept_bytes(self) -> int:
        """What is kept now, all layers together."""
        return sum(t.numel() * t.element_size() for kept in self._kept.values() for t in kept.values())

    def state(self) -> dict[str, Tensor]:
        return {
            f"{layer}.{name}": tensor.to("cpu", copy=True)
            for layer, kept in self._kept.items()
            for name, tensor in kept.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        found: dict[int, dict[str, Tensor]] = {}
        for path, tensor in state.items():
            number, _, name = path.partition(".")
            found.setdefault(int(number) if number.isdecimal() else -1, {})[name] = tensor
        expected = {name: tensor.dtype for name, tensor in self._begin(1, torch.device("cpu")).items()}
        for layer, kept in found.items():
            if layer not in self.layers or {name: tensor.dtype for name, tensor in kept.items()} != expected:
                raise ValueError(f"layer {layer} has {sorted(kept)}; layers {self.layers} have {sorted(expected)}")
        self._kept, self._restored = found, set(found)


class Rows:
    """Rows of one text on their way to a reducer: those of tokens that are computed again are left out."""

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
