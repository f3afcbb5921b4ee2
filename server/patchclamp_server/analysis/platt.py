"""Scores become probabilities: p = 1 / (1 + exp(-(slope · score + intercept))), by maximum likelihood.

Targets are (n+ + 1) / (n+ + 2) for the n+ texts of the label and 1 / (n- + 2) for the others, so that scores which tell
both apart without a fault keep a finite slope. Newton's method on standardised scores, with halved steps where a whole
one would lose likelihood.

Source: Platt 1999, Probabilistic Outputs for Support Vector Machines; Lin, Lin and Weng 2007, A Note on Platt's
Probabilistic Outputs for Support Vector Machines.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MAX_STEPS = 100
# Of the gradient, by text.
TOLERANCE = 1e-10


class Calibration(NamedTuple):
    slope: float
    intercept: float

    def probabilities(self, scores: Floats) -> Floats:
        return _sigmoid(self.slope * scores + self.intercept)


def platt(scores: Floats, is_target: Bools) -> Calibration:
    """Returns slope and intercept; scores that are all the same have slope 0."""
    n_target, n_other = int(is_target.sum()), int((~is_target).sum())
    targets = np.where(is_target, (n_target + 1) / (n_target + 2), 1 / (n_other + 2))
    mean, deviation = float(scores.mean()), float(scores.std())
    x = (scores - mean) / deviation if deviation > 0 else np.zeros_like(scores)
    a, b = 0.0, float(np.log((n_target + 1) / (n_other + 1)))
    loss = _loss(a * x + b, targets)
    for _ in range(MAX_STEPS):
        p = _sigmoid(a * x + b)
        gradient = np.array([np.dot(p - targets, x), (p - targets).sum()])
        if np.abs(gradient).max() <= TOLERANCE * len(x):
            break
        w = p * (1 - p)
        hessian = np.array([[np.dot(w, x * x), np.dot(w, x)], [np.dot(w, x), w.sum()]]) + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while (tried := _loss((a - size * step[0]) * x + b - size * step[1], targets)) > loss and size > 1e-10:
            size /= 2
        if tried > loss:
            break
        a, b, loss = a - size * float(step[0]), b - size * float(step[1]), tried
    slope = a / deviation if deviation > 0 else 0.0
    return Calibration(slope, b - slope * mean)


def _sigmoid(z: Floats) -> Floats:
    # exp(-log(1 + exp(-z))) does not overflow.
    found: Floats = np.exp(-np.logaddexp(0.0, -z))
    return found


def _loss(z: Floats, targets: Floats) -> float:
    return float(np.sum(np.logaddexp(0.0, z) - targets * z))
