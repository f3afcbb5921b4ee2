"""The k largest of each row, as a mask."""

import torch
from torch import Tensor


def count(keep: float, n: int) -> int:
    """How many of n a keep ratio keeps: the nearest whole number."""
    return min(n, int(keep * n + 0.5))


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """[..., n] -> bool: exactly `count(keep, n)` of each row, whatever ties there are."""
    chosen = scores.topk(count(keep, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, chosen, True)
