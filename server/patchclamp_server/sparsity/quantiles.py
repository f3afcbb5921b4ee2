"""Thresholds that keep a wanted share: calibration quantiles of magnitudes, on a fixed grid."""

import torch
from torch import Tensor

STEPS = 200


def quantiles(magnitudes: Tensor) -> Tensor:
    """[STEPS + 1]: quantile i / STEPS of all values, by nearest rank."""
    ordered = magnitudes.flatten().float().sort().values
    ranks = torch.linspace(0, len(ordered) - 1, STEPS + 1, dtype=torch.float64).round().long()
    return ordered[ranks]


def threshold(grid: Tensor, keep: float) -> Tensor:
    """The value that a share `keep` of the calibration magnitudes reaches; keep 0 keeps nothing."""
    if keep <= 0.0:
        return grid.new_tensor(float("inf"))
    return grid[round((1.0 - keep) * STEPS)]
