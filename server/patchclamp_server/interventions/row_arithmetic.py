"""The sums and roundings of edits: on a CPU in float32 each row is summed by itself in one order.

Elsewhere torch does both. What operators.py leaves to torch on a CPU is rounded once for each number, which gives the
same result however many rows there are.
"""

import torch
from torch import Tensor

from patchclamp_server.cpu.invariant import operators
from patchclamp_server.cpu.invariant.operators import holds_for


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Returns x_i · y_i of rows [n, width], as [n]."""
    if not holds_for(x):
        return (x * y).sum(1)
    return operators.row_dots(x, y)


def row_norms(x: Tensor) -> Tensor:
    """Returns |x_i| of rows [n, width], as [n]."""
    length: Tensor = operators.row_norms(x) if holds_for(x) else torch.linalg.vector_norm(x, dim=1)
    return length


def interpolate(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Returns start + share (end - start), which is exactly `start` at 0 and `end` at 1. Shapes: [n, width] with a
    share [n, 1], or [n] all."""
    if not holds_for(start):
        return torch.lerp(start, end, share)
    distance = end - start
    return torch.where(share.abs() < 0.5, start + share * distance, end - distance * (1 - share))


def add_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Returns x + y z."""
    return x + y * z if holds_for(x) else torch.addcmul(x, y, z)


def turns(sine: Tensor, cosine: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos θ and sin θ of θ = min(most, atan2(sine, cosine)), [n] each."""
    if not holds_for(sine):
        angle = torch.minimum(most, torch.atan2(sine, cosine))
        return torch.cos(angle), torch.sin(angle)
    return operators.turns(sine, cosine, most)
