"""A product with very many outputs, of which only the largest matter: all are seen through a copy in 4 bits, and those
that are among the largest there are then computed as they are.

    ŷ = Ŵ round(x);  y_o = W_o · x for the CANDIDATES largest ŷ_o, else ŷ_o

SVD-softmax (Shim, Lee, Choi, Boo and Sung 2017) does so with a low-rank preview. Groups of 32 weights have a float16
scale and low, from the least to the largest of them.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, call-arg, var-annotated"

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.atomics import keep
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.sparse.codes import Codes
from patchclamp_server.cpu.sparse.glanced import TILE, GlancedCodes
from patchclamp_server.cpu.sparse.kept import count_from
from patchclamp_server.cpu.vector import LANES, UNIT

CANDIDATES = 512
# Weights of fewer bits are read as they are.
_WORTH_BITS = 6
_ROWS = 4096

_compiled = numba.njit(nogil=True, cache=True)


@dataclass(frozen=True, eq=False)
class Preview:
    product: StoredProduct
    bias: Tensor | None
    tiles: GlancedCodes

    @classmethod
    def of(cls, linear: Linear) -> "Preview | None":
        """Returns the preview of a projection whose weights are stored, or None where it would not pay."""
        if linear.matrix is None or linear.product is None:
            return None
        out, width = linear.matrix.shape
        if out % TILE or width % UNIT or out < 4 * CANDIDATES or 8 * linear.matrix.nbytes <= _WORTH_BITS * out * width:
            return None
        parts = [_codes(linear.rows(torch.arange(o, min(out, o + _ROWS)))) for o in range(0, out, _ROWS)]
        tiles = GlancedCodes.of(parts)
        return None if tiles is None else cls(linear.product, linear.bias, tiles)

    def refine(self, x: Tensor, y: Tensor) -> None:
        """Sets the candidates of y [T, out], biases included, to their products with x [T, in]."""
        values, outputs = y.numpy(), np.empty(CANDIDATES, dtype=np.int64)
        bits = np.empty(-(-y.shape[1] // LANES) * LANES, dtype=np.int32)
        for row, own in zip(x.contiguous(), values, strict=True):
            found = outputs[: _largest(own, bits, outputs)]
            exact = self.product.multiply_chosen(row[None].numpy(), found)[0]
            own[found] = exact if self.bias is None else exact + self.bias.numpy()[found]


def _codes(weights: Tensor) -> Codes:
    groups = weights.view(len(weights), -1, UNIT)
    low = groups.amin(2).half().float()
    scale = ((groups.amax(2) - low) / 15).clamp_min(1e-7).half().float()
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return Codes(codes.view(weights.shape).to(torch.uint8).numpy(), scale.numpy(), low.numpy(), UNIT)


@_compiled
def _largest(values, bits, outputs):
    """Writes the places of the largest values, as many as `outputs` has, in ascending order, and returns their number:
    of equal ones at the end it has the first."""
    n, k = values.shape[0], outputs.shape[0]
    own = values.view(np.int32)
    for o in range(n):
        # As integers, numbers below 0 have the opposite order.
        bits[o] = own[o] ^ ((own[o] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    bits[n:] = np.int32(-0x80000000)
    filled, place = bits.shape[0], bits.ctypes.data
    least, most, count = np.int64(-0x80000000), np.int64(0x7FFFFFFF), filled
    while count != k and most - least > 1:
        middle = (least + most) >> 1
        above = count_from(place, filled, np.int32(middle))
        if above >= k:
            least, count = middle, above
        else:
            most = middle
    found = 0
    for o in range(n):
        if bits[o] >= least and found < k:
            outputs[found] = o
            found += 1
    keep(bits)
    return found
