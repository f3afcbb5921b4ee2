"""Linear discriminant: v ∝ Σ⁻¹ (mean(h⁺) - mean(h⁻)), with Σ the covariance within the sides.

Σ is the mean of the covariances of both sides, weighted by their examples, each shrunk towards its diagonal as Ledoit
and Wolf do, on standardised coordinates: without that a few loud coordinates would set how far all are shrunk, and with
fewer examples than coordinates Σ has no inverse. It is scikit-learn's LinearDiscriminantAnalysis(solver="lsqr",
shrinkage="auto"). Where nothing varies within the sides, v is the difference of means.

Length: ‖mean(h⁺) - mean(h⁻)‖, so that a strength means the same for every method. Source: Fisher 1936; Ledoit and Wolf
2004, A well-conditioned estimator for large-dimensional covariance matrices; of activations Marks and Tegmark 2024,
The Geometry of Truth, §5 (mass-mean probing).
"""

import numpy as np
import torch


def directions(positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns the directions [layers, d] of positive [n, layers, d] and negative [m, layers, d]. Nothing is random;
    `seed` is not used."""
    layers = zip(positive.unbind(dim=1), negative.unbind(dim=1), strict=True)
    return torch.stack([_scaled(*sides) for sides in layers])


def _scaled(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Returns the scaled direction [d] of positive [n, d] and negative [m, d]."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    difference = positive.mean(dim=0) - negative.mean(dim=0)
    states = torch.cat([positive, negative]).double().numpy()
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    found = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(states, labels)
    normal = torch.from_numpy(found.coef_[0]).to(positive.dtype)
    if not normal.any():
        return difference
    scaled: torch.Tensor = torch.nn.functional.normalize(normal, dim=0) * difference.norm()
    return scaled
