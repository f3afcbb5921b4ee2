"""Matrix products: y = x Wᵀ + b for x [T, in], W [out, in].

On a CPU in float32 the product that is fastest depends on the number of rows:

- one or two rows stream the weights once, so fewer bytes are faster: codes, where the weights are quantised
  (quantized.py); otherwise ``W @ [x, x]ᵀ``, because a matrix times two columns is a blocked product on all threads, and
  times one column a matrix-vector product that BLAS runs on one;
- more rows: oneDNN, with weights packed once for its kernels.

Milliseconds for the 120 matrices of SmolLM2-135M (425 MB), 2 cores with spinning threads, one run:

    rows   F.linear   W @ [x, x]ᵀ   oneDNN, packed
       1       35          14             19          (codes, on one thread: 7)
       2       54          13             20
       4       44          18             16
      16       47          41             25
      64      127          90             76

The packed copy is kept beside what few rows need. Other devices and dtypes keep the plain matrix alone, which a down
projection has input-major: the weights of one neuron are contiguous, so that a sparse read skips those of the others.
A product is as fast either way, and there is no second copy.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from patchclamp_server.model.quantized import QuantizedWeight

# oneDNN picks the packed layout for a number of rows; 16 was the best or within noise for 1 to 256 rows.
_PACK_FOR_ROWS = 16
FEW_ROWS = 2


class Linear:
    """One projection. Rows of the result never depend on the values of other rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, input_major: bool = False) -> None:
        self.bias = bias  # [out]
        self.weight: Tensor | None = weight  # [out, in]; its transpose is contiguous where it is input-major
        self.packed: Tensor | None = None
        self.quantized: QuantizedWeight | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C._has_mkldnn:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS)
            # Products of codes are compiled by numba, which only this path needs.
            from patchclamp_server.model.quantized import recover

            self.quantized = recover(weight)
            if self.quantized is not None:
                self.weight = None
        elif input_major:
            self.weight = weight.t().contiguous().t()

    def __call__(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[0]
        if rows > FEW_ROWS:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        if self.quantized is not None:
            y = self.quantized.multiply(x)
        else:
            assert self.weight is not None
            two = torch.cat((x, x)) if rows == 1 else x
            y = torch.mm(self.weight, two.t()).t()[:rows].contiguous()
        return y if self.bias is None else y.add_(self.bias)
