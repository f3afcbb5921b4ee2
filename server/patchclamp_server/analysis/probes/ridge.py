"""Ridge regression onto a number of each text: W, b minimise Σ_i (W x_i + b - y_i)² + penalty · ‖W‖².

The intercept has no penalty. Source: Hoerl & Kennard 1970, Ridge Regression; as probes of numbers Gurnee & Tegmark
2023, Language Models Represent Space and Time.
"""

import numpy as np

from patchclamp_server.analysis.probes.method import Doubles, Fit


def fit(x: Doubles, y: Doubles, n_classes: int, strength: float) -> Fit:
    """`n_classes` is 1."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=strength).fit(x, y)
    return Fit(model.coef_[None], np.atleast_1d(model.intercept_))


def loss(scores: Doubles, y: Doubles) -> Doubles:
    found: Doubles = np.square(scores[:, 0] - y)
    return found
