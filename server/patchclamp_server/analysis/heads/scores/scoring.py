"""What a scoring method is asked, and its answer: one number for every head."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.artifacts.types import NO_TAGS, Tags

RESAMPLES = 1000
# The evidence tells more of so many heads.
BEST = 10


@dataclass(frozen=True)
class Fact:
    """A `prompt` that `answer` continues; a time-conditioned prompt names a time."""

    prompt: str
    answer: str
    time_conditioned: bool


@dataclass(frozen=True)
class Scoring:
    """What to score. `method` is a name of SCORING_METHODS; without `facts` the built-in ones are used."""

    method: str
    ngram: int = 2
    # So many random tokens come before they repeat.
    sequence_tokens: int = 64
    sequences: int = 8
    seed: int = 0
    facts: tuple[Fact, ...] = ()
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True, eq=False)
class HeadScores:
    """All scores are [n_layers, n_heads], float32 on the CPU.

    `low` and `high` are a 95 % bootstrap interval, where a score is a mean of several measurements. `control` is the
    same measurement on random targets, facts or weights, as the method says. `evidence` holds what JSON can hold.
    """

    scores: Tensor
    control: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def means(cls, samples: Tensor, control: Tensor, seed: int) -> "HeadScores":
        """Returns the means of `samples` and `control` [n, n_layers, n_heads] over n, with intervals where n > 1."""
        interval = ends(resampled_means(samples, seed)) if len(samples) > 1 else (None, None)
        return cls(samples.mean(0), control.mean(0), *interval)

    @property
    def best(self) -> list[tuple[int, int]]:
        """Returns (layer, head), best first; equal ones are ordered by layer and head."""
        n_heads = self.scores.shape[1]
        order = self.scores.flatten().argsort(descending=True, stable=True)[:BEST]
        return [divmod(index, n_heads) for index in order.tolist()]

    def by_head(self, values: Tensor) -> dict[str, Any]:
        """Returns the mean of `values` [n_layers, n_heads] and their values for the best heads, as evidence."""
        best = [{"layer": layer, "head": head, "value": float(values[layer, head])} for layer, head in self.best]
        return {"mean": float(values.mean()), "best": best}


def resampled_means(samples: Tensor, seed: int) -> Tensor:
    """Returns the means [RESAMPLES, ...] of RESAMPLES draws with replacement from samples [n, ...]."""
    n = len(samples)
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    share = torch.zeros(RESAMPLES, n).scatter_add_(1, drawn, torch.full((RESAMPLES, n), 1 / n))
    return (share @ samples.reshape(n, -1)).view(RESAMPLES, *samples.shape[1:])


def ends(means: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the ends of the middle 95 % of means [n, ...]."""
    low, high = means.quantile(torch.tensor([0.025, 0.975]), dim=0)
    return low, high
