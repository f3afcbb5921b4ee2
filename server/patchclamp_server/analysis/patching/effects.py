"""The effect of a patch is the share of the difference of two runs that it brings about.

    effect = Σ_i (patched_i - unpatched_i) / Σ_i (source_i - unpatched_i)      over pairs i

Sums are divided, not pairs, so that no pair with a small difference decides (Wang et al. 2023). An interval has the
middle 95 % of the effect over RESAMPLES draws of pairs with replacement, the same ones for every cell, but those whose
differences cancel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument

RESAMPLES = 1000
# In nats, by pair: below it a difference could not be told from rounding.
MIN_DIFFERENCE = 1e-3
_CELLS_AT_ONCE = 1024
# Of the differences of a draw, without regard to their signs: a sum below it is 0 but for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Effects:
    """All are float64 [cells]."""

    effect: Tensor
    low: Tensor
    high: Tensor


def check_difference(source: Tensor, unpatched: Tensor) -> None:
    """Raises InvalidArgument where no effect is defined. Both are float64 [pairs]."""
    difference = float((source - unpatched).mean())
    if not abs(difference) >= MIN_DIFFERENCE:
        raise InvalidArgument(
            "pairs",
            f"the metric is {float(source.mean()):.4f} in the runs that activations come from, and "
            f"{float(unpatched.mean()):.4f} in those that they are put into; an effect is a share of the difference, "
            f"which must be at least {MIN_DIFFERENCE}: send pairs that the model tells apart",
        )


def drawn_counts(pairs: int, seed: int) -> Tensor:
    """Returns how often each pair is in each draw, float64 [RESAMPLES, pairs]."""
    drawn = torch.randint(pairs, (RESAMPLES, pairs), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(RESAMPLES, pairs, dtype=torch.float64)
    return torch.zeros(RESAMPLES, pairs, dtype=torch.float64).scatter_add_(1, drawn, ones)


def effects(patched: Tensor, source: Tensor, unpatched: Tensor, counts: Tensor) -> Effects:
    """Returns the effects of metrics float64 [pairs, cells]; those of the runs without a patch are [pairs]."""
    changes, differences = patched - unpatched[:, None], source - unpatched
    effect = changes.sum(0) / differences.sum()
    if len(patched) < 2:
        return Effects(effect, effect, effect)
    shares = torch.tensor([0.025, 0.975], dtype=torch.float64)
    # In a draw whose differences cancel there is nothing that an effect could be a share of.
    counts = counts[(counts @ differences).abs() > _ROUNDING * (counts @ differences.abs())]
    bounds = [
        ((counts @ part) / (counts @ differences)[:, None]).quantile(shares, dim=0)
        for part in torch.split(changes, _CELLS_AT_ONCE, dim=1)
    ]
    low, high = torch.cat(bounds, dim=1)
    return Effects(effect, low, high)


def has_both_signs(source: Tensor, unpatched: Tensor, counts: Tensor) -> bool:
    """Whether the difference of the runs changes its sign from draw to draw: intervals are then wide, or wrong."""
    drawn = counts @ (source - unpatched)
    return bool((drawn > 0).any() and (drawn < 0).any())
