"""Welch's t of each neuron between two kinds of texts.

    t_j = (m₁ - m₂) / √(v₁ / n₁ + v₂ / n₂)        means m and unbiased variances v of its pooled activation

Neurons with the largest t are the network of the first kind, as functional localizers find voxels that answer to
sentences more than to lists of non-words. A neuron that is equal in all texts has t = 0; one that is equal in all of
each kind, and not in both, the largest float32 of its sign.

Source: AlKhamissi et al. 2024, The LLM Language Network: A Neuroscientific Approach for Identifying Causally
Task-Relevant Units; Welch 1947.
"""

from torch import Tensor


def scores(activations: Tensor, is_target: Tensor) -> Tensor:
    """Returns t float32 [units] of activations [texts, units]; is_target bool [texts], at least two of both kinds."""
    target, other = activations[is_target].double(), activations[~is_target].double()
    error = (target.var(0) / len(target) + other.var(0) / len(other)).sqrt()
    t: Tensor = ((target.mean(0) - other.mean(0)) / error).float().nan_to_num(nan=0.0)
    return t
