"""Matrix products of the CPU path: y = x Wᵀ + b for x [T, in], W [out, in].

Measured on 2 cores (float32, the 120 matrices of a 135M model, one run, milliseconds a pass; `F.linear` | here):
T=1 35 | 13, T=2 54 | 13, T=4 44 | 16, T=16 47 | 25, T=64 127 | 80, T=256 367 | 270. Two choices make the difference:

- one or two rows: ``W @ [x, x]ᵀ``. A matrix times two columns is a blocked product that streams W with all threads;
  times one column it is a matrix-vector product that BLAS runs on one thread.
- more rows: oneDNN with weights packed once for its kernels.

The packed copy is kept beside the plain one where memory allows (`Packing.BOTH`).
"""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN picks the packed layout for a number of rows; 16 was the best or within noise for 1 to 256 rows.
_PACK_FOR_ROWS = 16


class Packing(Enum):
    # Plain weights only (other devices and dtypes).
    NONE = "none"
    # Plain and packed weights.
    BOTH = "both"


class Linear:
    """One projection. Rows of the result never depend on the values of other rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, packing: Packing) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.packed: Tensor | None = None
        if packing is Packing.BOTH:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS)

    def __call__(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[0]
        if rows > 2:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        two = torch.cat((x, x)) if rows == 1 else x
        y = torch.mm(self.weight, two.t()).t()[:rows]
        return (y + self.bias if self.bias is not None else y).contiguous()


def packing_for(weight: Tensor) -> Packing:
    """Packed copies are made for float32 on the CPU, where oneDNN has the kernels."""
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C._has_mkldnn
    return Packing.BOTH if usable else Packing.NONE
