"""The grid of quantiles that calibration takes of magnitudes, from which policies read their thresholds."""

import torch
from torch import Tensor

from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.sparsity.policies.shares import STEPS

# So many values are sorted together, which takes a few milliseconds of a CPU.
PART = 1 << 15


def quantiles(magnitudes: Tensor) -> Sliced[Tensor]:
    """Returns quantile i / STEPS of all values by nearest rank, [STEPS + 1]. No value may be negative.

    A work in slices: parts are sorted one by one, and the values of all ranks are found by bisection over all float32,
    whose bits as integers have the order of the values.
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
        # This counts the values that are no larger.
        counts = sum((torch.searchsorted(part, middle.int(), right=True) for part in parts), torch.zeros_like(ranks))
        low, high = torch.where(counts > ranks, low, middle + 1), torch.where(counts > ranks, middle, high)
    return low.int().view(torch.float32)
