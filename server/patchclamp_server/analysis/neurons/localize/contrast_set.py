"""Neurons that stand out for one kind of texts in most subsets of them, pruned once.

    z_js = (m₁ - m₂) / √(v₁ / n₁ + v₂ / n₂)       of neuron j in subset s of the texts of both kinds
    in the set: z_js ≥ z in at least `agreement` of the subsets;   score_j = mean of z_js over subsets

The texts of each kind are dealt out among the subsets at random: a neuron that stands out in all does not owe it to a
few texts. Neurons outside of the set have no score.

The set is found once, by activations alone, and judged by an edit of it beside random sets (EvaluateNeuronEdit).
"""

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.localize.welch_t import mean_difference
from patchclamp_server.errors import InvalidArgument


def scores(
    activations: Tensor, is_target: Tensor, *, z: float, subsets: int, agreement: int, seed: int, field: str = "subsets"
) -> Tensor:
    """Returns the scores float32 [units] of activations [texts, units], -inf outside of the set.

    Raises InvalidArgument on `field` where a subset has fewer than two texts of a kind.
    """
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.empty(len(is_target), dtype=torch.int64)
    for kind in (is_target, ~is_target):
        places = kind.nonzero()[:, 0]
        if len(places) < 2 * subsets:
            message = f"{subsets} subsets need two texts of each kind: {2 * subsets}, and one kind has {len(places)}"
            raise InvalidArgument(field, message)
        dealt[places[torch.randperm(len(places), generator=generator)]] = torch.arange(len(places)) % subsets
    found = []
    for subset in range(subsets):
        own = dealt == subset
        difference, error = mean_difference(activations[own], is_target[own])
        found.append(torch.where(error > 0, difference / error.clamp(min=torch.finfo(error.dtype).tiny), 0.0))
    each = torch.stack(found)
    enough = (each >= z).sum(0) >= agreement
    return torch.where(enough, each.mean(0), -torch.inf).float()
