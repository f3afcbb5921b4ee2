"""Thresholds that keep a wanted share: calibration quantiles of magnitudes, on a fixed grid."""

import torch
from torch import Tensor

from patchclamp_server.engine.exclusive import Slice, Sliced

STEPS = 200
# Values that are sorted together: a few milliseconds of a CPU.
PART = 1 << 15


def quantiles(magnitudes: Tensor) -> Sliced[Tensor]:
    """[STEPS + 1]: quantile i / STEPS of all values, none of which is negative, by nearest rank.

    A work in slices: parts are sorted one by one, and the values of all ranks are found by bisection of what a float32
    can be, whose bits as integers have the order of the values.
    """
    parts: list[Tensor] = []
    left = list(torch.split(magnitudes.flatten(), PART))[::-1]
    while left:
        granted = yield Slice(len(left))
        for part in [left.pop() for _ in range(min(granted, len(left)))]:
            parts.append(part.float().sort().values.view(torch.int32))
    n = magnitudes.numel()
    ranks = torch.linspace(0, n - 1, STEPS + 1, dtype=torch.float64).round().long().to(magnitudes.device)
    low = torch.zeros_like(ranks)
    high = low + max(int(part[-1]) for part in parts)
    while bool((low < high).any()):
        yield Slice(1)
        middle = (low + high) // 2
        # How many values are no larger.
        counts = sum((torch.searchsorted(part, middle.int(), right=True) for part in parts), torch.zeros_like(ranks))
        low, high = torch.where(counts > ranks, low, middle + 1), torch.where(counts > ranks, middle, high)
    return low.int().view(torch.float32)


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
