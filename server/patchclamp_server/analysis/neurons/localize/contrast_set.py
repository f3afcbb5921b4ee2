"""Neurons that stand out for one kind of texts in most subsets of them, pruned once.

    z_js = (m₁ - m₂) / √(v₁ / n₁ + v₂ / n₂)       of neuron j in subset s of the texts of both kinds (welch_t.py)
    in the set: z_js ≥ z in at least `agreement` of the subsets;   score_j = mean of z_js over subsets

The documents of each kind are dealt out among the subsets at random: a neuron that stands out in all does not owe it
to a few texts. Neurons outside of the set have no score.

The set is found once, by activations alone, and judged by an edit of it beside random sets (EvaluateNeuronEdit).
"""

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.localize import welch_t


def scores(
    activations: Tensor, is_target: Tensor, documents: Tensor, *, z: float, subsets: int, agreement: int, seed: int
) -> Tensor:
    """Returns the scores float32 [units] of activations [texts, units], -inf outside of the set.

    `documents` int64 [texts]: the document of each text, at least 2 · subsets of each kind.
    """
    dealt = dealt_out(is_target, documents, subsets, seed)
    each = torch.stack([welch_t.scores(activations[dealt == s], is_target[dealt == s]) for s in range(subsets)])
    enough = (each >= z).sum(0) >= agreement
    return torch.where(enough, each.double().mean(0), -torch.inf).float()


def dealt_out(is_target: Tensor, documents: Tensor, subsets: int, seed: int) -> Tensor:
    """Returns the subset int64 [texts] of each text."""
    generator = torch.Generator().manual_seed(seed)
    subset = torch.empty(int(documents.max()) + 1, dtype=torch.int64)
    for kind in (is_target, ~is_target):
        own = torch.tensor(sorted(set(documents[kind].tolist())))
        subset[own[torch.randperm(len(own), generator=generator)]] = torch.arange(len(own)) % subsets
    return subset[documents]
