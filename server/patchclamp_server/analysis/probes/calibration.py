"""Platt's calibration: p' = 1 / (1 + exp(-(slope · s + intercept))) for the log-odds s of a probe, on other texts.

    minimises Σ_i -t_i log p'_i - (1 - t_i) log(1 - p'_i)
    t = (n⁺ + 1) / (n⁺ + 2) of positives, 1 / (n⁻ + 2) of others

The smoothed targets keep p' off 0 and 1 where the texts are separated. Source: Platt 1999, Probabilistic Outputs for
Support Vector Machines; solved as scikit-learn's CalibratedClassifierCV solves it.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from patchclamp_server.analysis.probes.method import Doubles


def platt(scores: Doubles, positive: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns slope and intercept, given the log-odds [n] of texts and which are of the target: some, and not all."""
    n_positive = int(positive.sum())
    targets = np.where(positive, (n_positive + 1.0) / (n_positive + 2.0), 1.0 / (len(positive) - n_positive + 2.0))
    # The solver likes scores near 1.
    scale = max(1.0, float(np.abs(scores).max()))
    x = scores / scale

    def loss(parameters: Doubles) -> tuple[float, Doubles]:
        odds = parameters[0] * x + parameters[1]
        error = expit(odds) - targets
        return float((np.logaddexp(0.0, odds) - targets * odds).sum()), np.array([(error * x).sum(), error.sum()])

    start = np.array([scale, np.log((n_positive + 1.0) / (len(positive) - n_positive + 1.0))])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 1e-14}).x
    return float(found[0] / scale), float(found[1])
