"""What a kind of probe is to training: how it is fitted at a strength, and how badly it then predicts.

A method sees standardised inputs x [n, k], and y: the class of each text, or of ridge its number. A strength is that of
the penalty, or the temperature of prototypes; larger ones say less of the texts.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Fit:
    """Rows of a map of x: scores are x · matrixᵀ + bias [n, classes]. `stored`: what the artifact keeps of x instead,
    where that differs from the map, such as the class means [classes, k]; `temperature` is that of prototypes."""

    matrix: Doubles  # [classes, k]
    bias: Doubles  # [classes]
    centres: Doubles | None = None
    temperature: float | None = None

    def scores(self, x: Doubles) -> Doubles:
        found: Doubles = x @ self.matrix.T + self.bias
        return found


class Method(Protocol):
    def fit(self, x: Doubles, y: Doubles, n_classes: int, strength: float) -> Fit: ...

    def loss(self, scores: Doubles, y: Doubles) -> Doubles:
        """Returns the loss [n] of each text: nats of its label, or the squared error of its number."""
        ...


def nats(scores: Doubles, y: Doubles) -> Doubles:
    """Returns -log softmax(scores)_y [n]."""
    largest = scores.max(axis=1, keepdims=True)
    logs = scores - largest - np.log(np.exp(scores - largest).sum(axis=1, keepdims=True))
    found: Doubles = -np.take_along_axis(logs, y.astype(np.int64)[:, None], axis=1)[:, 0]
    return found
