"""Logistic regression with an L2 penalty: p = softmax(W x + b), which minimises

    Σ_i -log p_i(y_i) + penalty / 2 · ‖W‖²              of two classes ‖w‖² of the one normal w = w_1 - w_0

as scikit-learn does with C = 1 / penalty. The intercept has no penalty. Source: Alain & Bengio 2016, Understanding
intermediate layers using linear classifier probes.
"""

import logging
import warnings

import numpy as np

from patchclamp_server.analysis.probes.method import Doubles, Fit, nats

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 1000

loss = nats


def fit(x: Doubles, y: Doubles, n_classes: int, strength: float) -> Fit:
    """Every class occurs in `y`. Of two classes the rows are -w/2 and w/2, so that their difference is the normal."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1.0 / strength, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y.astype(np.int64))
    if model.n_iter_.max() >= MAX_ITERATIONS:
        logger.warning("a logistic probe stopped after %d iterations before it converged", MAX_ITERATIONS)
    matrix, bias = model.coef_, model.intercept_
    if n_classes == 2:
        matrix, bias = np.concatenate((-matrix, matrix)) / 2, np.concatenate((-bias, bias)) / 2
    return Fit(matrix, bias)
