"""Logistic probe: the normal of the regression p(positive | h) = sigmoid(w · (h - μ)/s + b) with L2 (C = 1).

μ and s are mean and standard deviation of each coordinate over both sides, so that the penalty treats all coordinates
alike; the normal in the space of the activations is w / s. Its length is set to ‖mean(h⁺) - mean(h⁻)‖, so that a
strength means the same for every method. Unlike a difference of means it discounts directions that vary within
a side. Source: Alain & Bengio 2016, Understanding intermediate layers using linear classifier probes.
"""

import logging

import numpy as np
import torch

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 1000


def directions(positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns the directions [layers, d] of positive, negative [n, layers, d]. The solver (L-BFGS) has no randomness;
    `seed` is not used."""
    layers = zip(positive.unbind(dim=1), negative.unbind(dim=1), strict=True)
    return torch.stack([_scaled_normal(*sides) for sides in layers])


def _scaled_normal(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Returns the scaled normal [d] of positive, negative [n, d]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    length = (positive.mean(dim=0) - negative.mean(dim=0)).norm()
    scaler = StandardScaler()
    standardised = scaler.fit_transform(torch.cat([positive, negative]).double().numpy())
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    probe = LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS).fit(standardised, labels)
    if probe.n_iter_[0] >= MAX_ITERATIONS:
        logger.warning("the logistic probe stopped after %d iterations before it converged", MAX_ITERATIONS)
    # scale_ is 1 where a coordinate is constant.
    normal = torch.from_numpy(probe.coef_[0] / scaler.scale_).to(positive.dtype)
    scaled: torch.Tensor = torch.nn.functional.normalize(normal, dim=0) * length
    return scaled
