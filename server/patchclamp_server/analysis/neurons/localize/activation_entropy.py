"""Neurons of single languages: the entropy of their probability of being active.

    p_jk = share of the tokens of label k at which neuron j is above a threshold
    q_jk = p_jk / Σ_k p_jk;   entropy_j = -Σ_k q_jk log q_jk        nats
    candidates: neurons with max_k p_jk ≥ the quantile `activity` of all p
    specific:   the `share` of all neurons, or so many, with the lowest entropies among the candidates
    set of label k: specific neurons with p_jk ≥ the same quantile, and p_jk > 0

A neuron can be in the sets of several labels. The score of a set is the negative entropy, so that the most specific
stand first.

Source: Tang et al. 2024, Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entropies:
    """Flat over units: `entropy` float64 [units], nats; `specific` bool [units]; `active` bool [labels, units]: p is
    above 0 and at least `bound`, the quantile."""

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
    # The quantile is the lower of two neighbours. torch.quantile() takes no more than 2^24 numbers.
    flat = probabilities.flatten()
    bound = float(flat.kthvalue(int(activity * (len(flat) - 1)) + 1).values)
    active = (probabilities >= bound) & (probabilities > 0)
    candidates = active.any(0)
    order = torch.where(candidates, entropy, torch.inf).argsort(stable=True)[:count]
    specific = torch.zeros_like(candidates)
    specific[order] = True
    return Entropies(entropy, specific & candidates, active, bound)
