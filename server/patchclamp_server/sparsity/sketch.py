"""A low-bit copy of a matrix: what a policy reads of the neurons that it does not compute.

    W ≈ scale · code + low      by groups of at most 64 columns, code in [0, 2^bits), scale and low in bfloat16

The range of a group is shrunk (by up to half) where that lessens its squared error. `SketchedRows` and
`SketchedColumns` multiply by it: on a CPU it is kept packed and few rows read it so (model/sparse/low_bits.py), while
for more it is unpacked, which takes as long as some tens of rows. Other devices keep it as a plain matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.model.sparse import LowBitInputs, LowBitOutputs

GROUP = 64
SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# Rows of x up to which the packed product, one row at a time, is sooner done than unpacking.
PACKED_ROWS = 32


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


def sketch(weight: Tensor, bits: int) -> Sketch:
    """The low-bit copy of `weight` [out, in]."""
    out, width = weight.shape
    groups = weight.float().view(out, -1, group_of(width))
    least, most = groups.amin(2), groups.amax(2)
    centre, radius = (least + most) / 2, (most - least) / 2
    steps = 2**bits - 1
    best_error = torch.full_like(centre, float("inf"))
    scale, low = torch.zeros_like(centre), torch.zeros_like(centre)
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
    """x @ M, where M is the sketch of a matrix, in the dtype of x."""

    def __init__(self, made: Sketch, layout: type[LowBitOutputs] | type[LowBitInputs], like: Tensor) -> None:
        """M has the device and dtype of `like`."""
        self._dtype = like.dtype
        self._packed: LowBitOutputs | LowBitInputs | None = None
        self._matrix: Tensor | None = None
        if like.device.type == "cpu":
            self._packed = layout.of(made.codes, made.scale, made.low, made.bits)
        else:
            dense = made.dense().to(like.dtype)
            self._matrix = dense.t() if layout is LowBitOutputs else dense

    def __call__(self, x: Tensor) -> Tensor:
        """Rows of the result do not depend on each other."""
        if self._packed is None:
            assert self._matrix is not None
            return x @ self._matrix
        if len(x) <= PACKED_ROWS:
            return self._packed.multiply(x).to(x.dtype)
        return x @ self._packed.matrix().to(self._dtype)


def sketched_rows(weight: Tensor, bits: int) -> SketchedProduct:
    """x [n, in] -> x Ŵᵀ [n, out] for `weight` [out, in]."""
    return SketchedProduct(sketch(weight, bits), LowBitOutputs, weight)


def sketched_columns(weight: Tensor, bits: int) -> SketchedProduct:
    """x [n, out] -> x Ŵ [n, in] for `weight` [out, in]. What is 0 in x need not be read."""
    return SketchedProduct(sketch(weight, bits), LowBitInputs, weight)


def row_bits(bits: int, width: int) -> float:
    """Bits that a weight takes in `sketched_rows` of matrices [out, width]."""
    return LowBitOutputs.bits_per_weight(bits, group_of(width))


def column_bits(bits: int, width: int) -> float:
    """Bits that a weight takes in `sketched_columns`."""
    return LowBitInputs.bits_per_weight(bits, group_of(width), width)
