"""This is the matrix product of the kernels."""

import triton
import triton.language as tl

from patchclamp_kernels.runtime import INTERPRETED

# Triton 3.6's interpreter multiplies the bits of bfloat16 operands. Widening them changes no product.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, total):
    """Returns total + a b in float32; float32 operands are not shortened to tf32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
