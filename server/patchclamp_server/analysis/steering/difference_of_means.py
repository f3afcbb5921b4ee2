"""Difference of means: v = mean(h⁺) - mean(h⁻).

The length is part of the result: strength 1 moves the mean negative activation onto the mean positive one.
Source: Rimsky et al. 2023, Steering Llama 2 via Contrastive Activation Addition, §3.
"""

import torch


def directions(positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns directions [layers, d] of positive, negative [n, layers, d]. Nothing is random; `seed` is not used."""
    return positive.mean(dim=0) - negative.mean(dim=0)
