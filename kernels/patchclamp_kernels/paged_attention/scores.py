"""Both kernels compute products and scores in this way."""

import math

import triton
import triton.language as tl


@triton.jit
def exponents(products, scale, ceiling, HAS_CAP: tl.constexpr):
    """Returns scores in powers of 2, for exp2: products · scale, below a soft cap of `ceiling`; see `exponent_scale`.

    tanh(x) = 1 - 2 / (exp(2x) + 1) is exact to 1e-7 of the cap, and right at both infinities of exp.
    """
    scores = products * scale
    if HAS_CAP:
        scores = ceiling * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    return scores


def exponent_scale(scale: float, soft_cap: float) -> tuple[float, float]:
    """Returns `scale` and `ceiling` of the kernels: cap · tanh(s · scale / cap), or s · scale, times log2(e)."""
    log2_e = 1 / math.log(2)
    return (scale * 2 * log2_e / soft_cap if soft_cap else scale * log2_e), soft_cap * log2_e
