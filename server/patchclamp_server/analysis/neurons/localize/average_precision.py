"""Neurons as detectors of the texts of a label: average precision.

    AP_j = Σ_n (R_n - R_{n-1}) P_n        precision P and recall R of "a_j ≥ threshold" at each threshold n, falling
    score_j = max(AP of a_j, AP of -a_j)

a_j: the pooled activation of the neuron in each text. Equal activations are one threshold, so that the order of texts
does not matter (scikit-learn's definition). A neuron that tells nothing has the share of the label among the texts.

Source: Cuadros et al. 2022, Self-conditioning pre-trained language models; for relations: Liu et al. 2025, On
Relation-Specific Neurons in Large Language Models.
"""

import torch
from torch import Tensor

# Bounds the memory of the sorted copies.
UNITS_AT_ONCE = 1024


def average_precision(activations: Tensor, is_target: Tensor) -> Tensor:
    """Returns AP [units] of activations [texts, units] as scores of is_target bool [texts], at least one of which is
    true."""
    values, order = activations.sort(dim=0, descending=True, stable=True)
    hits = is_target[order].double()  # [texts, units]
    texts = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)[:, None]
    precision = hits.cumsum(0) / texts
    # Where a threshold ends: the last of equal values.
    ends = torch.ones_like(values, dtype=torch.bool)
    ends[:-1] = values[:-1] != values[1:]
    places = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    # The end of the group of each place: the first end that is not before it.
    end = torch.where(ends, places, len(values)).flip(0).cummin(0).values.flip(0)
    return (hits * precision.gather(0, end)).sum(0) / hits.sum(0)


def scores(activations: Tensor, is_target: Tensor) -> Tensor:
    """Returns the larger AP of each unit and its negative, float32 [units]."""
    found = [
        torch.maximum(average_precision(own, is_target), average_precision(-own, is_target))
        for own in torch.split(activations, UNITS_AT_ONCE, dim=1)
    ]
    return torch.cat(found).float()
