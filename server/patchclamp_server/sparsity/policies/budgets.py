"""A budget gives a layer more neurons where leaving them out does more harm, at the same average.

damage [n_layers, GRID] is D_l(k), what keeping a share k of layer l does to the output distribution. It is the
divergence KL(dense ‖ sparse) measured with that layer alone sparse at REFERENCE, carried to other shares by the squared
error of the layer's output, of which a small divergence is a linear function:  D_l(k) = KL_l · ε_l(k)² / ε_l(ref)². The
error is over rows whose output norm is not an outlier (interventions/pooling.py), as it is at attention sinks.

`allocate` starts dense and takes one step of the grid at a time, where it adds least damage, until the average is met.
"""

import torch
from torch import Tensor

GRID = tuple(step / 20 for step in range(21))
REFERENCE = 0.3


def allocate(damage: Tensor, keep: float) -> list[float]:
    """Returns shares by layer, whose mean is `keep` to within one step of one layer, from above."""
    harm = damage.tolist()
    steps = [len(GRID) - 1] * len(harm)
    total = sum(steps)
    while total > keep * (len(GRID) - 1) * len(harm) + 1e-6 and total:
        added = [
            layer_harm[step - 1] - layer_harm[step] if step else float("inf")
            for layer_harm, step in zip(harm, steps, strict=True)
        ]
        cheapest = min(range(len(added)), key=added.__getitem__)
        steps[cheapest] -= 1
        total -= 1
    return [GRID[step] for step in steps]


def damage_curves(divergence: Tensor, squared_errors: Tensor) -> Tensor:
    """Returns D [n_layers, GRID] from the divergence [n_layers] at REFERENCE and ε² [n_layers, GRID]."""
    at_reference = squared_errors[:, GRID.index(REFERENCE), None]
    curves = divergence.clamp_min(0.0)[:, None] * squared_errors / at_reference.clamp_min(1e-30)
    # More neurons never count as more harm, because noise would stop the descent.
    return curves.flip(1).cummax(1).values.flip(1).to(torch.float32)
