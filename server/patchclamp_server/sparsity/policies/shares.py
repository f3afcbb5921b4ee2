"""A keep ratio keeps the k largest of each row, or what passes a threshold that calibration found.

Thresholds are quantiles of the magnitudes of calibration, on a fixed grid.
"""

import torch
from torch import Tensor

STEPS = 200


def threshold(grid: Tensor, keep: float) -> Tensor:
    """Returns the value that a share `keep` of the calibration magnitudes reaches; keep 0 keeps nothing."""
    if keep <= 0.0:
        return grid.new_tensor(float("inf"))
    return grid[round((1.0 - keep) * STEPS)]


def count(keep: float, n: int) -> int:
    """Returns how many of n a keep ratio keeps: the nearest whole number."""
    return min(n, int(keep * n + 0.5))


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """Returns a mask of scores [..., n] with exactly `count(keep, n)` of each row, whatever ties there are."""
    chosen = scores.topk(count(keep, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, chosen, True)
