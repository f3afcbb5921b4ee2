"""Fits one probe to texts: standardises, chooses the strength by cross-validation, and fits to all of them.

    x = (h - mean) / scale       by coordinate, of the training texts; one that is constant but for the
                                 rounding of float32 has the scale 1
    z = x V                      V [k, n]: where there are fewer texts than coordinates, an orthonormal basis of them

All methods have the same solution in either, since they measure length alone: W_x = W_z Vᵀ. A text is in one fold with
all windows of its document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.analysis.probes.method import Doubles, Fit, Integers, Method

FOLDS = 5
# Of the mean of a coordinate, and of one around 0.
ROUNDING, TINY = 1e-6, 1e-30
# Times the number of coordinates, which is the squared length of an average standardised text.
STRENGTHS = tuple(10.0**k for k in range(-3, 4))


@dataclass(frozen=True, eq=False)
class Standardised:
    """`z` [n, k] of the training texts, and the way there from states [n, width]."""

    mean: Doubles
    scale: Doubles
    basis: Doubles | None
    z: Doubles

    @classmethod
    def of(cls, states: Doubles) -> "Standardised":
        deviation = states.std(axis=0)
        mean = states.mean(axis=0)
        # What rounding makes of a constant would be read as if it were a feature, and lost again where the probe is
        # served: states are float32.
        varies = deviation > np.maximum(ROUNDING * np.abs(mean), TINY)
        scale = np.where(varies, deviation, 1.0)
        x = (states - mean) / scale
        if len(x) >= x.shape[1]:
            return cls(mean, scale, None, x)
        basis = np.linalg.svd(x, full_matrices=False)[2].T
        return cls(mean, scale, basis, x @ basis)

    def turned(self, states: Doubles) -> Doubles:
        """Returns z of other states. What of them lies outside of the training texts is in no solution."""
        x = (states - self.mean) / self.scale
        found: Doubles = x if self.basis is None else x @ self.basis
        return found

    def back(self, rows: Doubles) -> Doubles:
        """Returns rows [classes, width] of x, given those of z."""
        return rows if self.basis is None else rows @ self.basis.T


@dataclass(frozen=True, eq=False)
class Examples:
    """`y` [n]: classes, or numbers; `documents` [n] that the texts are windows of."""

    y: Doubles
    documents: Integers
    n_classes: int

    def __len__(self) -> int:
        return len(self.y)


def strengths(width: int) -> tuple[float, ...]:
    """Returns what cross-validation chooses from, for inputs of so many coordinates."""
    return tuple(width * factor for factor in STRENGTHS)


def chosen_strength(method: Method, z: Doubles, examples: Examples, width: int, seed: int) -> float:
    """Returns the strength with the smallest mean loss over the left-out folds; of equal ones the largest."""
    folds = _folds(examples, seed)
    found = []
    for strength in strengths(width):
        losses = []
        for fold in range(int(folds.max()) + 1):
            inside = folds != fold
            fit = method.fit(z[inside], examples.y[inside], examples.n_classes, strength)
            losses.append(method.loss(fit.scores(z[~inside]), examples.y[~inside]))
        found.append((float(np.concatenate(losses).mean()), -strength))
    return -min(found)[1]


def fitted(
    method: Method, states: Doubles, examples: Examples, strength: float | None, seed: int
) -> tuple[Standardised, Fit, float]:
    """Returns the inputs, the fit in z, and its strength: the given one, or with None the one chosen."""
    inputs = Standardised.of(states)
    if strength is None:
        strength = chosen_strength(method, inputs.z, examples, states.shape[1], seed)
    return inputs, method.fit(inputs.z, examples.y, examples.n_classes, strength), strength


def _folds(examples: Examples, seed: int) -> Integers:
    """Returns the fold of each text. Documents of a class are dealt in turn, so that each fold leaves some of each."""
    generator = np.random.default_rng(seed)
    documents, first = np.unique(examples.documents, return_index=True)
    kinds: Doubles = examples.y[first] if examples.n_classes > 1 else np.zeros(len(documents))
    fewest = min(int((kinds == kind).sum()) for kind in np.unique(kinds))
    fold_of = np.empty(len(documents), dtype=np.int64)
    for kind in np.unique(kinds):
        own = generator.permutation(np.flatnonzero(kinds == kind))
        fold_of[own] = np.arange(len(own)) % max(2, min(FOLDS, fewest))
    found: Integers = fold_of[np.searchsorted(documents, examples.documents)]
    return found


def side_by_side(states: NDArray[np.floating[Any]], rows: Sequence[int]) -> Doubles:
    """Returns [n, len(rows) · width] of states [n, layers, width]."""
    return states[:, list(rows)].reshape(len(states), -1).astype(np.float64)
