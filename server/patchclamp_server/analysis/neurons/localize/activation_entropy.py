"""Neurons of single languages: the entropy of their probability of being active.

    p_jk = share of the tokens of label k at which neuron j is above a threshold
    q_jk = p_jk / Σ_k p_jk;   entropy_j = -Σ_k q_jk log q_jk        nats
    candidates: neurons with max_k p_jk ≥ the quantile `activity` of all p
    specific:   the `share` of all neurons, or so many, with the lowest entropies among the candidates
    set of label k: specific neurons with p_jk ≥ the same quantile

A neuron can be in the sets of several labels. The score of a set is the negative entropy, so that the most specific
stand first.

Source: Tang et al. 2024, Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entropies:
    """Flat over units: `entropy` float64 [units], nats; `specific` bool [units]; `active` bool [labels, units]: p is at
    least `bound`, the quantile."""

    entropy: Tensor
    specific: Tensor
    active: Tensor
    bound: float

    def scores(self, label: int) -> Tensor:
        """Returns negative entropies float32 [units] of the set of a label, -inf outside of it."""
        return torch.where(self.specific & self.active[label], -self.entropy, -torch.inf).float()


def entropies(probabilities: Tensor, *, activity: float, count: int) -> Entropies:
    """Of probabilities float64 [labels, units], at least two labels. `count`: how many units are specific at most."""
    total = probabilities.sum(0)
    q = probabilities / total.clamp(min=torch.finfo(probabilities.dtype).tiny)
    entropy = torch.special.entr(q).sum(0)
    # quantile() sorts at most 2^24 numbers; the rank is the same.
    flat = probabilities.flatten()
    rank = min(len(flat) - 1, int(activity * (len(flat) - 1)))
    bound = float(flat.kthvalue(rank + 1).values)
    candidates = (probabilities.amax(0) >= bound) & (total > 0)
    order = torch.where(candidates, entropy, torch.inf).argsort(stable=True)[:count]
    specific = torch.zeros_like(candidates)
    specific[order] = True
    return Entropies(entropy, specific & candidates, probabilities >= bound, bound)
