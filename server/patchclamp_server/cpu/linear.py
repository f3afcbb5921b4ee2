"""A projection computes the matrix product y = x Wᵀ + b for x [T, in], W [out, in].

Weights that are stored (stored.py), and any where it is `batch_invariant`, on a CPU in float32, have one product for
every number of rows, whose bits do not depend on it (products.py). Otherwise it uses the product that was fastest for
the number of rows when this was measured:

- one row streams the weights once: our own vectors (vector.py), by all threads where there are enough bytes;
- more rows, float32: oneDNN, with weights packed once for its kernels; bfloat16: torch.

These are the least milliseconds of one run on 2 shared cores, where the weights come from memory (one matrix of an 8B
model, 30 of SmolLM2-135M, or its unembedding):

    rows  float32         F.linear   W @ [x, x]ᵀ   oneDNN, packed   ours       bfloat16   F.linear   ours
       1  28672 x 4096        23.0          31.3             27.0   17.5                      13.8    9.2
       1   4096 x 14336       10.1          12.4              9.7    7.5                       6.0    4.0
       1   4096 x 4096         4.3           4.7              3.5    2.6                       1.9    1.5
       1    960 x 576, 30      6.6           5.0              6.7    5.7                       5.9    3.7
       1    576 x 1536, 30     7.7           7.4              8.9    6.4                       6.4    4.4
       1  49152 x 576         10.0           4.2              5.5    5.2                       7.3    6.9
       2  28672 x 4096        44.8          24.3             21.1   30.1                      10.1   16.1
       2   4096 x 14336       20.2          14.2             10.2   15.1                       5.4    7.0
       2    960 x 576, 30     10.7           5.1              7.4    6.9                       5.3    4.4

There a down projection is kept input-major: the weights of one neuron are contiguous, so that a sparse read skips those
of the others without a copy. Its product with one row is then a sum of columns, 8.5 and 4.2 ms for the second line.
The packed copy is kept beside what one row needs. Other devices and dtypes keep the plain matrix alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.stored import StoredMatrix

if TYPE_CHECKING:
    from patchclamp_server.cpu.products import StoredProduct

# oneDNN picks the packed layout for a number of rows; 16 was the best or within noise for 1 to 256 rows.
_PACK_FOR_ROWS = 16


def can_be_invariant(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Returns whether there are products whose bits do not depend on the number of rows."""
    return torch.device(device).type == "cpu" and dtype == torch.float32


class Linear:
    """A projection. Rows of the result never depend on the values of other rows."""

    def __init__(
        self,
        weight: Tensor | StoredMatrix,
        bias: Tensor | None,
        *,
        input_major: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self.bias = bias  # [out]
        self.weight: Tensor | None = None  # [out, in]; its transpose is contiguous where it is input-major
        self.matrix: StoredMatrix | None = None
        self.product: StoredProduct | None = None
        self.packed: Tensor | None = None
        self._one_row: Callable[[Tensor], Tensor] | None = None
        self.batch_invariant = batch_invariant
        if isinstance(weight, StoredMatrix):
            self._use_stored(weight)
            return
        self.out = weight.shape[0]
        is_float32 = can_be_invariant(weight.dtype, weight.device)
        assert not batch_invariant or is_float32
        if is_float32 and (batch_invariant or torch._C._has_mkldnn):
            if batch_invariant:
                self.weight = weight
                self._use_stored(StoredMatrix.of(weight))
                return
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS)
        self.weight = weight.t().contiguous().t() if input_major else weight
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
            from patchclamp_server.cpu.sparse.one_row import one_row_product

            self._one_row = one_row_product(self.weight, input_major=input_major)

    def _use_stored(self, matrix: StoredMatrix) -> None:
        # Only this path needs what numba compiles.
        from patchclamp_server.cpu.products import StoredProduct

        self.matrix, self.product, self.out = matrix, StoredProduct(matrix), matrix.shape[0]

    def round_inputs(self) -> bool:
        """Multiplies codes by inputs in 8 bits from now on, and returns whether there are codes."""
        from patchclamp_server.cpu.products import StoredProduct

        if self.matrix is not None:
            self.product = StoredProduct(self.matrix, rounds=True)
        return self.product is not None and self.product.rounds

    def taken(self, x: Tensor) -> Tensor:
        """Returns x [T, in] float32 as its codes are multiplied by it, for single outputs that are computed apart."""
        return x if self.product is None else self.product.taken(x)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        if self.matrix is not None:
            return self.matrix.shape
        assert self.weight is not None
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        if self.product is not None:
            return self._biased(self.product.multiply(x.float())).to(x.dtype)
        rows = x.shape[0]
        if self._one_row is not None and rows == 1:
            return self._biased(self._one_row(x)).to(x.dtype)
        if self.packed is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    def rows(self, outputs: Tensor) -> Tensor:
        """Returns the weights of chosen outputs [n], as [n, in] in float32."""
        if self.weight is not None:
            return self.weight.index_select(0, outputs).float()
        assert self.product is not None
        return self.product.rows(outputs)

    def columns(self, inputs: Tensor) -> Tensor:
        """Returns the weights of chosen inputs [n], as [n, out] in float32."""
        if self.weight is not None:
            return self.weight.index_select(1, inputs).t().float()
        assert self.product is not None
        # A sum of zeros and one weight is that weight.
        unit = torch.zeros(len(inputs), self.shape[1])
        return self.product.multiply(unit.scatter_(1, inputs[:, None], 1.0), exact=True)

    def dense(self) -> Tensor:
        """Returns the weights [out, in] in the dtype that the product has them in."""
        return self.weight if self.weight is not None else self.rows(torch.arange(self.out))

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y.add_(self.bias)
