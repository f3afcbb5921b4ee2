"""LAT: the first principal component of normalised differences of examples that were paired at random.

    d_k = (h_π(2k) - h_π(2k+1)) / ‖h_π(2k) - h_π(2k+1)‖      π: a seeded order of the examples of both sides together
    v   ∝ the unit u that maximises Σ ((d_k - mean(d)) · u)²

The labels choose the sign alone: positives project higher on average. Half of the pairs have both examples from one
side and show what else varies, so it needs more examples than methods that look at the labels, and finds another
direction where something else varies more. Length: ‖mean(h⁺) - mean(h⁻)‖, so that a strength means the same for every
method. Source: Zou et al. 2023, Representation Engineering, §3.1 (linear artificial tomography).
"""

import torch


def directions(positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns the directions [layers, d] of positive [n, layers, d] and negative [m, layers, d]. The order is the same
    at every layer; the last of an odd number of examples has no partner."""
    examples = torch.cat([positive, negative]).double()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    order = order[: len(examples) // 2 * 2]
    differences = torch.nn.functional.normalize(examples[order[::2]] - examples[order[1::2]], dim=-1)
    means = (positive.double().mean(dim=0) - negative.double().mean(dim=0)).unbind()
    layers = zip(differences.unbind(dim=1), means, strict=True)
    return torch.stack([_scaled(*layer) for layer in layers]).to(positive.dtype)


def _scaled(differences: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Returns the scaled component [d] of differences [k, d], given the difference of means [d]."""
    component = torch.linalg.svd(differences - differences.mean(dim=0), full_matrices=False).Vh[0]
    signed = -component if component @ mean < 0 else component
    scaled: torch.Tensor = signed * mean.norm()
    return scaled
