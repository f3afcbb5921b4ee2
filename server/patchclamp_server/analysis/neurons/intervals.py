"""Bootstrap intervals of the change of a metric under an edit, and of what it has beyond random sets.

    value    = f(Σ_i x_i / Σ_i w_i)        over items i: facts, texts or prompts; f: identity, or exp for perplexity
    change   = value edited - value unedited
    beyond   = change - mean over random sets of their changes

An interval has the middle 95 % of the statistic over RESAMPLES draws of items with replacement. The same draws are used
for the unedited model, the edit and every random set: what all have in common does not widen it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Items:
    """What was measured of each item: `x` and weights `w`, both float64 [items]."""

    x: Tensor
    w: Tensor


@dataclass(frozen=True)
class Interval:
    """A value with the middle 95 % of its resamples."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    unedited: float
    edited: float
    change: float
    low: float
    high: float
    random: tuple[float, ...]
    random_mean: float
    random_deviation: float
    beyond_random: float
    beyond_random_low: float
    beyond_random_high: float


def change_of(
    unedited: Items, edited: Items, random: Sequence[Items], f: Callable[[Tensor], Tensor], seed: int
) -> Change:
    """Returns the change and its intervals; without random sets, beyond_random is the change."""
    counts = resamples(len(unedited.x), seed)

    def value(items: Items) -> Tensor:
        return f((counts @ items.x) / (counts @ items.w))

    base, own = value(unedited), value(edited)
    others = torch.stack([value(items) - base for items in random]) if random else torch.zeros(0, len(base))
    change = own - base
    beyond = change - others.mean(0) if random else change
    of_random = others[:, 0]
    return Change(
        unedited=float(base[0]),
        edited=float(own[0]),
        change=float(change[0]),
        **_interval("", change),
        random=tuple(of_random.tolist()),
        random_mean=float(of_random.mean()) if random else 0.0,
        random_deviation=float(of_random.std(correction=0)) if random else 0.0,
        beyond_random=float(beyond[0]),
        **_interval("beyond_random_", beyond),
    )


def interval_of(items: Items, f: Callable[[Tensor], Tensor], seed: int) -> Interval:
    """Returns the value of items of which one has a weight; samples of others alone are left out."""
    counts = resamples(len(items.x), seed)
    weights = counts @ items.w
    samples = f((counts @ items.x)[weights > 0] / weights[weights > 0])
    return Interval(float(samples[0]), **_interval("", samples))


def resamples(n: int, seed: int) -> Tensor:
    """Returns how often each of n items is in a sample, float64 [1 + RESAMPLES, n]. The first sample has all once."""
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.ones(1 + RESAMPLES, n, dtype=torch.float64)
    counts[1:] = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, drawn, counts[1:])
    return counts


def _interval(prefix: str, samples: Tensor) -> dict[str, float]:
    low, high = samples[1:].quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return {f"{prefix}low": low, f"{prefix}high": high}
