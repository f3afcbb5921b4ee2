"""A sketch is a low-bit copy of a matrix, which a policy reads for the neurons that it does not compute.

    W ≈ scale · code + low      by groups of at most 64 columns, code in [0, 2^bits), scale and low in bfloat16

The range of a group is shrunk (by up to half) where that lessens its squared error. On a CPU the copy is kept packed:
few rows of x read it packed (cpu/sparse/low_bits.py); for more it is unpacked, which takes as long as some tens of
rows. Other devices keep it as a plain matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.cpu.sparse.low_bits import LowBitMatrix

GROUP = 64
SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# The packed product, one row at a time, is faster than unpacking for at most so many rows of x.
PACKED_ROWS = 32


@dataclass(frozen=True, eq=False)
class Sketch:
    """codes are [out, in] uint8; scale and low are [out, groups]."""

    bits: int
    codes: Tensor
    scale: Tensor
    low: Tensor

    def dense(self) -> Tensor:
        """Returns the matrix [out, in] that the codes stand for."""
        out, groups = self.scale.shape
        values = self.codes.view(out, groups, -1).to(self.scale.dtype)
        return (values * self.scale[:, :, None] + self.low[:, :, None]).view(out, -1)


def group_of(width: int) -> int:
    """Returns the largest divisor of the width that is at most GROUP."""
    return max(size for size in range(1, min(GROUP, width) + 1) if width % size == 0)


def sketch(weight: Tensor, bits: int) -> Sketch:
    """Returns the low-bit copy of `weight` [out, in]."""
    out, width = weight.shape
    groups = weight.float().view(out, -1, group_of(width))
    least, most = groups.amin(2), groups.amax(2)
    centre, radius = (least + most) / 2, (most - least) / 2
    steps = 2**bits - 1
    best_error = torch.full_like(centre, float("inf"))
    scale, low = torch.zeros_like(centre), centre.bfloat16().float()
    for shrink in SHRINK:
        step = (2 * shrink / steps * radius).clamp_min(1e-12).bfloat16().float()
        first = (centre - shrink * radius).bfloat16().float()
        codes = ((groups - first[..., None]) / step[..., None]).round().clamp(0, steps)
        error = (codes * step[..., None] + first[..., None] - groups).square().sum(2)
        better = error < best_error
        scale, low = torch.where(better, step, scale), torch.where(better, first, low)
        best_error = torch.minimum(error, best_error)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, steps)
    return Sketch(bits, codes.view(out, width).to(torch.uint8), scale, low)


class SketchedProduct:
    """Maps x [n, in] to x Ŵᵀ [n, out] for `weight` [out, in] and its sketch Ŵ. Rows of the result are independent."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        made = sketch(weight, bits)
        self._dtype = weight.dtype
        self._packed: LowBitMatrix | None = None
        self._matrix: Tensor | None = None
        if weight.device.type != "cpu":
            self._matrix = made.dense().to(weight.dtype)
            return
        self._packed = LowBitMatrix.of(made.codes, made.scale, made.low, bits)
        # This compiles what is compiled at run time.
        self._packed.multiply(torch.zeros(1, weight.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            assert self._matrix is not None
            return torch.nn.functional.linear(x, self._matrix)
        if len(x) <= PACKED_ROWS:
            return self._packed.multiply(x).to(x.dtype)
        return x @ self._packed.matrix().to(self._dtype)


def sketch_bits(bits: int, width: int) -> float:
    """Returns the bits that a weight takes in a packed sketch of a matrix [out, width]."""
    return LowBitMatrix.bits_per_weight(bits, group_of(width))
