"""The search for the scale, and the minimum, of a group of weights: least squares for each of some candidates.

Codes are whole numbers, so that the best scale of a group is not the one by which its range fits their range. As
llama.cpp does it (`make_qkx2_quants` and `make_qx_quants` of ggml-quants.c), candidates around that scale give codes,
these codes give the scale and minimum that are best for them, and the candidate with the least error is taken:

    affine:     min over s ≥ 0, m of      Σ_k w_k (s c_k + m - x_k)²,  c_k = round((x_k - least) / candidate) in 0…top
    symmetric:  min over s            of  Σ_k w_k (s c_k - x_k)²,      c_k = round(x_k / candidate) in -bound…bound-1

The weights w_k = sqrt(mean x²) + |x_k| say that large weights of a model matter more. (llama.cpp has x_k² for the
symmetric search; of heavy tails that leaves a larger error in all than plain rounding.)

numba's cache of the modules that call this looks at the text of these files alone: a change here needs one there.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

import numba
import numpy as np

# Sums in any order are vectors; numbers are finite here (rows.py).
compiled = numba.njit(nogil=True, cache=True, fastmath=True)

_AFFINE_CANDIDATES = 21
_SYMMETRIC_CANDIDATES = 19
_STEP = np.float32(0.1)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


@compiled
def affine(x, weight, top, highest):  # type: ignore[no-untyped-def]
    """Returns scale ≥ 0 and minimum of a group x [n], with codes 0…top; `weight` [n] is scratch.

    The minimum is at most `highest`: 0 where the format has only negative ones, infinity elsewhere.
    """
    n = x.shape[0]
    least, largest, squares = x[0], x[0], _ZERO
    for k in range(n):
        least, largest = min(least, x[k]), max(largest, x[k])
        squares += x[k] * x[k]
    least = min(least, highest)
    if largest <= least:
        return _ZERO, least
    usual = np.float32(np.sqrt(squares / np.float32(n)))
    sum_w, sum_x, sum_xx = _ZERO, _ZERO, _ZERO
    for k in range(n):
        w = usual + abs(x[k])
        weight[k] = w
        sum_w += w
        sum_x += w * x[k]
        sum_xx += w * x[k] * x[k]
    scale, minimum, error = (largest - least) / np.float32(top), least, np.inf
    for candidate in range(_AFFINE_CANDIDATES):
        inverse = (np.float32(top) - _ONE + _STEP * np.float32(candidate)) / (largest - least)
        sum_c, sum_cc, sum_cx = _ZERO, _ZERO, _ZERO
        for k in range(n):
            code = np.float32(np.int32((x[k] - least) * inverse + _HALF))
            code = min(code, np.float32(top))
            wc = weight[k] * code
            sum_c += wc
            sum_cc += wc * code
            sum_cx += wc * x[k]
        # What follows are differences of nearly equal numbers.
        c, cc, cx, w, wx = (
            np.float64(sum_c),
            np.float64(sum_cc),
            np.float64(sum_cx),
            np.float64(sum_w),
            np.float64(sum_x),
        )
        determinant = w * cc - c * c
        if determinant <= 1e-9 * w * cc:
            continue
        s = (w * cx - wx * c) / determinant
        m = (cc * wx - c * cx) / determinant
        if m > highest:
            s, m = cx / cc, np.float64(0)
        own = np.float64(sum_xx) + s * s * cc + m * m * w + 2 * s * m * c - 2 * s * cx - 2 * m * wx
        if s > 0 and own < error:
            scale, minimum, error = np.float32(s), np.float32(m), own
    return scale, minimum


@compiled
def symmetric(x, bound):  # type: ignore[no-untyped-def]
    """Returns the scale, of any sign, of a group x [n] with codes -bound…bound-1; 0 where all weights are 0."""
    n = x.shape[0]
    largest = _ZERO
    for k in range(n):
        if abs(x[k]) > abs(largest):
            largest = x[k]
    # A group this small would have infinite candidates.
    if abs(largest) < np.float32(1e-30):
        return _ZERO
    squares = _ZERO
    for k in range(n):
        # Relative to the largest, squares of small weights stay numbers.
        share = x[k] / largest
        squares += share * share
    usual = np.float32(np.sqrt(squares / np.float32(n)))
    low, high = np.float32(-bound), np.float32(bound - 1)
    scale, gain = largest / low, np.float64(-1)
    for candidate in range(_SYMMETRIC_CANDIDATES):
        # The largest weight has the code -bound, of which there is one more than of positive codes.
        inverse = (low - _STEP * np.float32(candidate - _SYMMETRIC_CANDIDATES // 2)) / largest
        sum_cc, sum_cx = _ZERO, _ZERO
        for k in range(n):
            code = min(max(np.rint(x[k] * inverse), low), high)
            share = x[k] / largest
            wc = (usual + abs(share)) * code
            sum_cc += wc * code
            sum_cx += wc * share
        if sum_cc > 0 and np.float64(sum_cx) * sum_cx / sum_cc > gain:
            gain = np.float64(sum_cx) * sum_cx / sum_cc
            scale = np.float32(np.float64(sum_cx) / sum_cc * largest)
    return scale
