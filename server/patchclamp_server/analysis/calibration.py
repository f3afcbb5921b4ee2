"""Scores become probabilities, and probabilities are held against what came.

    p = 1 / (1 + exp(-(slope · s + intercept)))
    slope, intercept   minimise Σ_i -t_i log p_i - (1 - t_i) log(1 - p_i)
    t = (n⁺ + 1) / (n⁺ + 2) of texts of the label, 1 / (n⁻ + 2) of the others
    reliability        by bins of p: how probable the texts were said to be, and the share that is of the label

The smoothed targets keep p off 0 and 1 where the texts are separated. Sources: Platt 1999, Probabilistic Outputs for
Support Vector Machines, solved as scikit-learn's CalibratedClassifierCV solves it; Niculescu-Mizil and Caruana 2005,
Predicting Good Probabilities with Supervised Learning.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from patchclamp_server.model.arrays import BoolArray, FloatArray

BINS = 10
# Of the largest score: what rounding makes of scores that are all the same.
ROUNDING = 1e-12


class Calibration(NamedTuple):
    slope: float
    intercept: float

    def probabilities(self, scores: FloatArray) -> FloatArray:
        return _logistic(self.slope * scores + self.intercept)


@dataclass(frozen=True)
class ReliabilityBin:
    """Texts whose probability lies in [low, high), of the last bin in [low, 1]."""

    low: float
    high: float
    texts: int
    mean_probability: float
    share: float


def platt(scores: FloatArray, is_target: BoolArray) -> Calibration:
    """Returns slope and intercept, given the scores [n] of texts and which are of the label: some, and not all. Scores
    that are all the same have the slope 0."""
    from scipy.optimize import minimize

    n_target = int(is_target.sum())
    targets = np.where(is_target, (n_target + 1.0) / (n_target + 2.0), 1.0 / (len(is_target) - n_target + 2.0))
    # Not the deviation: of equal scores it is one of rounding, by which a slope would be divided.
    if float(scores.max() - scores.min()) <= ROUNDING * float(np.abs(scores).max()):
        share = float(targets.mean())
        return Calibration(0.0, math.log(share / (1.0 - share)))
    # The solver likes scores near 1.
    mean, deviation = float(scores.mean()), float(scores.std())
    x = (scores - mean) / deviation

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        odds = parameters[0] * x + parameters[1]
        error = _logistic(odds) - targets
        return float((np.logaddexp(0.0, odds) - targets * odds).sum()), np.array([(error * x).sum(), error.sum()])

    start = np.array([1.0, np.log((n_target + 1.0) / (len(is_target) - n_target + 1.0))])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 1e-15}).x
    slope = float(found[0]) / deviation
    return Calibration(slope, float(found[1]) - slope * mean)


def _logistic(x: FloatArray) -> FloatArray:
    found: FloatArray = torch.special.expit(torch.from_numpy(np.asarray(x))).numpy()
    return found


def reliability(probabilities: FloatArray, is_target: BoolArray) -> tuple[ReliabilityBin, ...]:
    """Returns the bins that have texts, of BINS of equal width."""
    which = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    return tuple(
        ReliabilityBin(
            b / BINS, (b + 1) / BINS, int(own.sum()), float(probabilities[own].mean()), float(is_target[own].mean())
        )
        for b in range(BINS)
        if (own := which == b).any()
    )
