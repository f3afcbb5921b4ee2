"""The plane on which values of a cycle lie in a circle.

    c = mean of the means m_v of the values' states;  p_1 ... p_k: principal components of m_v - c
    θ_v = angle of (p_j · (m_v - c), p_i · (m_v - c)),  φ_v = 2π v / n
    plane = span(p_i, p_j), i < j, with the largest |r|,
    r = Σ_(u<v) sin(θ_u - θ_v) sin(φ_u - φ_v) / sqrt(Σ_(u<v) sin²(θ_u - θ_v) · Σ_(u<v) sin²(φ_u - φ_v))

r is the circular correlation of Fisher and Lee (1983), ±1 where θ = ±φ + constant. The axes are ordered so that angles
grow along the cycle: a rotation by 2π k / n in the plane leads k values on.

Source: METHODS V6; Engels et al. 2024, Not All Language Model Features Are Linear.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

# Orders of the values that r is compared with.
SHUFFLES = 100
MIN_VALUES = 4
_NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class CircularPlane:
    """`axes` [2, width] orthonormal and `centre` [width], float32; `angles` [values] in the plane, radians.

    circularity: |r|; shuffled_circularity: the same for the best plane of shuffled values, the mean of SHUFFLES;
    explained_variance: share of the variance of the means that lies in the plane.
    """

    axes: Tensor
    centre: Tensor
    angles: tuple[float, ...]
    circularity: float
    shuffled_circularity: float
    explained_variance: float


def circular_plane(means: Tensor, components: int, seed: int) -> CircularPlane | None:
    """Returns the best plane of means [values, width] in the order of the cycle; None where they span no plane."""
    means = means.double()
    centre = means.mean(0)
    away = means - centre
    # The rank of what n centred points span is n - 1 at most.
    _, lengths, axes = torch.linalg.svd(away, full_matrices=False)
    n = min(components, len(means) - 1, int((lengths > _NOTHING * lengths.max().clamp(min=_NOTHING)).sum()))
    if n < 2:
        return None
    scores = away @ axes[:n].T  # [values, n]
    pairs = list(combinations(range(n), 2))
    angles = torch.stack([torch.atan2(scores[:, j], scores[:, i]) for i, j in pairs])
    correlations = circular_correlation(angles)
    best = int(correlations.abs().argmax())
    first, second = pairs[best]
    sign = -1.0 if correlations[best] < 0 else 1.0
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    shuffled = [
        circular_correlation(angles[:, torch.randperm(len(means), generator=generator)]).abs().max()
        for _ in range(SHUFFLES)
    ]
    plane = torch.stack((axes[first], sign * axes[second]))
    return CircularPlane(
        plane.float(),
        centre.float(),
        tuple((sign * angles[best]).tolist()),
        float(correlations[best].abs()),
        float(torch.stack(shuffled).mean()),
        float((away @ plane.T).square().sum() / away.square().sum()),
    )


def circular_correlation(angles: Tensor) -> Tensor:
    """Returns r [...] of angles [..., n] with the angles 2π v / n of a cycle; 0 where all angles are equal."""
    n = angles.shape[-1]
    cycle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    first, second = torch.triu_indices(n, n, offset=1)
    own = torch.sin(angles[..., first] - angles[..., second])
    of_cycle = torch.sin(cycle[first] - cycle[second])
    scale = (own.square().sum(-1) * of_cycle.square().sum()).sqrt()
    return torch.where(scale > 0, (own * of_cycle).sum(-1) / scale, torch.zeros_like(scale))
