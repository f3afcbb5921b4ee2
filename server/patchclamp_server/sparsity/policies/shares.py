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


def count(keep: float, n: int) -> int:
    """How many of n a keep ratio keeps: the nearest whole number."""
    return min(n, int(keep * n + 0.5))


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """[..., n] -> bool: exactly `count(keep, n)` of each row, whatever ties there are."""
    chosen = scores.topk(count(keep, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, chosen, True)
