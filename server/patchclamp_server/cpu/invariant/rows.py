"""These loops do what a decoder does to each row besides products, on a CPU in float32, in a pass over the row each.

A row is computed by itself, in the order that is written: no flag allows another order, and no vector ends where a
batch or a thread does. So its bits depend neither on the other rows nor on how many there are, which torch's operators
do not promise: the end of a range is computed by other instructions than its vectors, and ranges end where threads
divide them. Arrays are numpy's. numba compiles this once and caches it on disk; a change in tiles.py needs one here.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def"

import math

import numba
import numpy as np

from patchclamp_server.cpu.invariant.tiles import dot, sum_of
from patchclamp_server.cpu.vector import LANES

# A number divided by 0 is infinite or NaN, as for torch: a step says which rows are not finite.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

SILU, GELU, GELU_TANH, RELU = range(4)
# The keys are the names of DecoderSpec.activation.
CODES = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU}

# exp(x) = 2^n exp(r), with r = x - n ln 2 in two parts and Cephes' polynomial of expf; the error is below 2 ulp.
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Their exponentials are just normal, and just finite.
SMALLEST, LARGEST = np.float32(-87.0), np.float32(88.0)
_TANH_LARGEST = np.float32(10.0)


@compiled
def exponentials(x, powers):
    """Sets x [n] ← exp(x), within [exp(SMALLEST), exp(LARGEST)]; NaN stays. `powers` is memory for n int32."""
    # These are loops of plain arithmetic that count from 0, so that they become vectors.
    n = x.shape[0]
    power = powers.view(np.float32)
    for j in range(n):
        v = x[j]
        v = SMALLEST if v < SMALLEST else v
        v = LARGEST if v > LARGEST else v
        e = np.floor(v * _LOG2_E + np.float32(0.5))
        r = v - e * _LN2_HIGH - e * _LN2_LOW
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        x[j] = p * r * r + r + np.float32(1)
        powers[j] = (np.int32(e) + np.int32(127)) << np.int32(23)
    for j in range(n):
        x[j] *= power[j]


@compiled
def hyperbolic_tangents(x, doubled, powers):
    """Sets doubled [n] ← tanh(x) = 1 - 2 / (exp(2 x) + 1); near 0 by the polynomial of Cephes' tanhf."""
    n = x.shape[0]
    for j in range(n):
        v = x[j]
        v = -_TANH_LARGEST if v < -_TANH_LARGEST else v
        v = _TANH_LARGEST if v > _TANH_LARGEST else v
        doubled[j] = v + v
    exponentials(doubled, powers)
    for j in range(n):
        v = x[j]
        z = v * v
        p = np.float32(-5.70498872745e-3) * z + np.float32(2.06390887954e-2)
        p = p * z + np.float32(-5.37397155531e-2)
        p = p * z + np.float32(1.33314422036e-1)
        p = p * z + np.float32(-3.33332819422e-1)
        near = p * z * v + v
        far = np.float32(1) - np.float32(2) / (doubled[j] + np.float32(1))
        doubled[j] = near if abs(v) < np.float32(0.625) else far


@compiled
def rms_norms(x, weight, eps, out, start, end):
    """Sets out [n, width] = x / sqrt(mean x² + eps) · weight for rows start ≤ i < end."""
    for i in range(start, end):
        _rms_norm(x[i], weight, eps, out[i])


@compiled
def _rms_norm(x, weight, eps, out):
    width = weight.shape[0]
    scale = np.float32(1) / np.sqrt(dot(x, 0, x, 0, width) / np.float32(width) + eps)
    for k in range(width):
        out[k] = x[k] * scale * weight[k]


@compiled
def layer_norms(x, weight, bias, eps, out, start, end):
    """Sets out [n, width] = (x - mean x) / sqrt(var x + eps) · weight + bias for rows start ≤ i < end."""
    width = x.shape[1]
    for i in range(start, end):
        row, own = x[i], out[i]
        total = np.float32(0)
        # Sums of vectors end at a multiple of 16.
        whole = width // LANES * LANES
        total = sum_of(row, 0, whole)
        for k in range(whole, width):
            total += row[k]
        mean = total / np.float32(width)
        for k in range(width):
            own[k] = row[k] - mean
        scale = np.float32(1) / np.sqrt(dot(own, 0, own, 0, width) / np.float32(width) + eps)
        for k in range(width):
            own[k] = own[k] * scale * weight[k] + bias[k]


@compiled
def finish_heads(qkv, attended, weights, eps, cos, signed_sin, start, end):
    """Finishes queries and keys for attention in place: the first `attended` heads of qkv [n, heads, width].

    It applies RMS norms by weights [attended, width], if there are any, then x cos + roll(x, half) signed_sin, by cos
    and signed_sin [n, rotary], to the first dimensions; the others stay. It takes rows start ≤ i < end.
    """
    rotary = cos.shape[1]
    half = rotary // 2
    for i in range(start, end):
        for h in range(attended):
            head = qkv[i, h]
            if weights.shape[0]:
                _rms_norm(head, weights[h], eps, head)
            for k in range(half):
                low, high = head[k], head[half + k]
                head[k] = low * cos[i, k] + high * signed_sin[i, k]
                head[half + k] = high * cos[i, half + k] + low * signed_sin[i, half + k]


@compiled
def activations(z, kind, gated, h, start, end):
    """Sets h [n, width] = act(z) for z [n, width], and act(gate) · up for z [n, 2 width] with gates before ups."""
    width = h.shape[1]
    powers = np.empty(width, dtype=np.int32)
    for i in range(start, end):
        row, out = z[i], h[i]
        if kind == SILU:
            for k in range(width):
                out[k] = -row[k]
            exponentials(out, powers)
            for k in range(width):
                out[k] = row[k] / (np.float32(1) + out[k])
        elif kind == GELU:
            for k in range(width):
                out[k] = np.float32(-0.5) * row[k] * row[k]
            exponentials(out, powers)
            for k in range(width):
                # erf is that of Abramowitz and Stegun 7.1.26, whose error is at most 1.5e-7.
                a = row[k]
                t = np.float32(1) / (np.float32(1) + np.float32(0.3275911 * math.sqrt(0.5)) * abs(a))
                p = np.float32(1.061405429) * t - np.float32(1.453152027)
                p = p * t + np.float32(1.421413741)
                p = p * t - np.float32(0.284496736)
                p = p * t + np.float32(0.254829592)
                erf = np.float32(1) - p * t * out[k]
                out[k] = np.float32(0.5) * a * (np.float32(1) + (-erf if a < 0 else erf))
        elif kind == GELU_TANH:
            inner = np.empty(width, dtype=np.float32)
            for k in range(width):
                a = row[k]
                inner[k] = np.float32(math.sqrt(2 / math.pi)) * (a + np.float32(0.044715) * a * a * a)
            hyperbolic_tangents(inner, out, powers)
            for k in range(width):
                out[k] = np.float32(0.5) * row[k] * (np.float32(1) + out[k])
        else:
            for k in range(width):
                out[k] = np.float32(0) if row[k] < 0 else row[k]
        if gated:
            for k in range(width):
                out[k] *= row[width + k]


@compiled
def cap_softly(x, cap, start, end):
    """Sets x [n, width] ← cap tanh(x / cap), in place."""
    width = x.shape[1]
    scaled, out = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
    powers = np.empty(width, dtype=np.int32)
    for i in range(start, end):
        for k in range(width):
            scaled[k] = x[i, k] / cap
        hyperbolic_tangents(scaled, out, powers)
        for k in range(width):
            x[i, k] = out[k] * cap


@compiled
def row_dots(x, y, out):
    """Sets out[i] = x_i · y_i for rows of x and y [n, width]."""
    for i in range(x.shape[0]):
        out[i] = dot(x[i], 0, y[i], 0, x.shape[1])


@compiled
def pair_dots(x, rows, which, vectors, out):
    """Sets out[e] = x_rows[e] · v_which[e] for x [n, width] and vectors [k, width]."""
    for e in range(rows.shape[0]):
        out[e] = dot(x[rows[e]], 0, vectors[which[e]], 0, x.shape[1])


@compiled
def turns(sine, cosine, most, turned):
    """Sets turned[0] and [1] ← cos θ and sin θ of θ = min(most, atan2(sine, cosine))."""
    for i in range(sine.shape[0]):
        angle = min(np.float64(most[i]), math.atan2(np.float64(sine[i]), np.float64(cosine[i])))
        turned[0, i] = math.cos(angle)
        turned[1, i] = math.sin(angle)


@compiled
def low_rank(h, owner, difference, bias, rotation, out):
    """Adds Σ_r (D_r · h_i + b_r) R_r to out_i for rows h [n, width], with their owner's D, R [rank, width] and b."""
    for i in range(h.shape[0]):
        k = owner[i]
        own = out[i]
        for r in range(rotation.shape[1]):
            inner = dot(difference[k, r], 0, h[i], 0, h.shape[1]) + bias[k, r]
            # Ranks that pad an edit to the rank of others would turn -0 into 0.
            if inner != 0:
                row = rotation[k, r]
                for d in range(own.shape[0]):
                    own[d] += inner * row[d]


@compiled
def affine(h, owner, matrix, bias, out):
    """Sets out_i = A h_i + b for rows h [n, width], with their owner's A [out, width] and b [out]."""
    for i in range(h.shape[0]):
        k = owner[i]
        for d in range(matrix.shape[1]):
            out[i, d] = dot(matrix[k, d], 0, h[i], 0, h.shape[1]) + bias[k, d]


@compiled
def add_rows(owner, weights, vectors, out):
    """Adds Σ_r w_ir V_r to out_i, with their owner's V [r, width]; a weight of 0 leaves the bits alone."""
    for i in range(out.shape[0]):
        k = owner[i]
        own = out[i]
        for r in range(weights.shape[1]):
            weight = weights[i, r]
            if weight != 0:
                row = vectors[k, r]
                for d in range(own.shape[0]):
                    own[d] += weight * row[d]
