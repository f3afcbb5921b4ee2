"""A low-bit copy of a matrix: what a policy reads of the neurons that it does not compute.

    W ≈ scale · code + low      by groups of at most 64 inputs, code in [0, 2^bits)

The range of a group is shrunk (by up to half) where that lessens its squared error. `bits_per_weight` counts the codes
and a half-precision scale and low for each group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64
SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True, eq=False)
class Sketch:
    """codes [out, in] uint8; scale and low [out, groups]."""

    bits: int
    codes: Tensor
    scale: Tensor
    low: Tensor

    def dense(self) -> Tensor:
        """The matrix that the codes stand for [out, in]."""
        out, groups = self.scale.shape
        values = self.codes.view(out, groups, -1).to(self.scale.dtype)
        return (values * self.scale[:, :, None] + self.low[:, :, None]).view(out, -1)


def group_of(width: int) -> int:
    """The largest divisor of the width that is at most GROUP."""
    return max(size for size in range(1, min(GROUP, width) + 1) if width % size == 0)


def bits_per_weight(bits: int, width: int) -> float:
    return bits + 32 / group_of(width)


def sketch(weight: Tensor, bits: int) -> Sketch:
    """The low-bit copy of `weight` [out, in]."""
    out, width = weight.shape
    groups = weight.float().view(out, -1, group_of(width))
    least, most = groups.amin(2), groups.amax(2)
    centre, radius = (least + most) / 2, (most - least) / 2
    steps = 2**bits - 1
    best_error = torch.full_like(centre, float("inf"))
    scale, low = torch.zeros_like(centre), centre.clone()
    for shrink in SHRINK:
        step = (2 * shrink / steps * radius).clamp_min(1e-12)
        first = centre - shrink * radius
        codes = ((groups - first[..., None]) / step[..., None]).round().clamp(0, steps)
        error = (codes * step[..., None] + first[..., None] - groups).square().sum(2)
        better = error < best_error
        scale, low = torch.where(better, step, scale), torch.where(better, first, low)
        best_error = torch.minimum(error, best_error)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, steps)
    return Sketch(bits, codes.view(out, width).to(torch.uint8), scale, low)
