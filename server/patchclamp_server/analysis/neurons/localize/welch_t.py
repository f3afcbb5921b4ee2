"""Welch's t of each neuron between two kinds of texts.

    t_j = (m₁ - m₂) / √(v₁ / n₁ + v₂ / n₂)        means m and unbiased variances v of its pooled activation

Neurons with the largest t are the network of the first kind, as functional localizers find voxels that answer to
sentences more than to lists of non-words. A neuron that is equal in all texts has t = 0.

Source: AlKhamissi et al. 2024, The LLM Language Network: A Neuroscientific Approach for Identifying Causally
Task-Relevant Units; Welch 1947.
"""

import torch
from torch import Tensor


def scores(activations: Tensor, is_target: Tensor) -> Tensor:
    """Returns t float32 [units] of activations [texts, units]; is_target bool [texts], at least two of both kinds."""
    difference, error = mean_difference(activations, is_target)
    return torch.where(error > 0, difference / error.clamp(min=torch.finfo(error.dtype).tiny), 0.0).float()


def mean_difference(activations: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns m₁ - m₂ and its standard error, float64 [units]."""
    target, other = activations[is_target].double(), activations[~is_target].double()
    variance = target.var(0) / len(target) + other.var(0) / len(other)
    return target.mean(0) - other.mean(0), variance.sqrt()
