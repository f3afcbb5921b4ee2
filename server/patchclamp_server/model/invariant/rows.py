"""What a decoder does to each row besides products, on a CPU in float32, a pass over the row each.

A row is computed by itself, in the order that is written: no flag allows another one, no vector ends where a batch or a
thread does. So its bits depend neither on the other rows nor on how many there are, which torch's operators do not
promise: the end of a range is computed by other instructions than its vectors, and ranges end where threads divide
them. Arrays are numpy's. Compiled once and cached on disk; a change in tiles.py needs one here.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def"

import math

import numba
import numpy as np

from patchclamp_server.model.invariant.tiles import dot

compiled = numba.njit(nogil=True, cache=True)

SILU, GELU, GELU_TANH, RELU = range(4)

# exp(x) = 2^n exp(r), r = x - n ln 2 in two parts, exp(r) by the polynomial of Cephes' expf; error below 2 ulp.
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Whose exponentials are just normal, and just finite.
SMALLEST, LARGEST = np.float32(-87.0), np.float32(88.0)
_TANH_LARGEST = np.float32(10.0)


@compiled
def exponentials(x, at, n, powers):
    """x[at + j] ← exp(x[at + j]) for j < n, within [exp(SMALLEST), exp(LARGEST)]; NaN stays. `powers` [n] int32."""
    # Loops of plain arithmetic: they become vectors.
    power = powers.view(np.float32)
    for j in range(n):
        v = x[at + j]
        v = SMALLEST if v < SMALLEST else v
        v = LARGEST if v > LARGEST else v
        e = np.floor(v * _LOG2_E + np.float32(0.5))
        r = v - e * _LN2_HIGH - e * _LN2_LOW
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        x[at + j] = p * r * r + r + np.float32(1)
        powers[j] = (np.int32(e) + np.int32(127)) << np.int32(23)
    for j in range(n):
        x[at + j] *= power[j]


@compiled
def hyperbolic_tangents(x, n, doubled, powers):
    """doubled[j] ← tanh(x[j]) for j < n: 1 - 2 / (exp(2 x) + 1), near 0 by the polynomial of Cephes' tanhf."""
    for j in range(n):
        v = x[j]
        v = -_TANH_LARGEST if v < -_TANH_LARGEST else v
        v = _TANH_LARGEST if v > _TANH_LARGEST else v
        doubled[j] = v + v
    exponentials(doubled, 0, n, powers)
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
def rms_norms(x, weight, eps, out):
    """out [n, width] = x / sqrt(mean x² + eps) · weight."""
    width = x.shape[1]
    flat, flat_out = x.reshape(-1), out.reshape(-1)
    for i in range(x.shape[0]):
        _rms_norm(flat, i * width, weight, eps, flat_out)


@compiled
def _rms_norm(x, at, weight, eps, out):
    width = weight.shape[0]
    scale = np.float32(1) / np.sqrt(dot(x, at, x, at, width) / np.float32(width) + eps)
    for k in range(width):
        out[at + k] = x[at + k] * scale * weight[k]


@compiled
def layer_norms(x, weight, bias, eps, out):
    """out [n, width] = (x - mean x) / sqrt(var x + eps) · weight + bias."""
    width = x.shape[1]
    flat, flat_out = x.reshape(-1), out.reshape(-1)
    ones = np.ones(width, dtype=np.float32)
    for i in range(x.shape[0]):
        at = i * width
        mean = dot(flat, at, ones, 0, width) / np.float32(width)
        for k in range(width):
            flat_out[at + k] = flat[at + k] - mean
        scale = np.float32(1) / np.sqrt(dot(flat_out, at, flat_out, at, width) / np.float32(width) + eps)
        for k in range(width):
            flat_out[at + k] = flat_out[at + k] * scale * weight[k] + bias[k]


@compiled
def normalise_heads(qkv, width, weights, eps):
    """RMS norms of the heads of qkv [n, heads * width], in place; weights [normed heads, width]."""
    flat = qkv.reshape(-1)
    for i in range(qkv.shape[0]):
        for h in range(weights.shape[0]):
            _rms_norm(flat, i * qkv.shape[1] + h * width, weights[h], eps, flat)


@compiled
def rotate_heads(qkv, width, heads, cos, signed_sin):
    """x cos + roll(x, half) signed_sin for the first `heads` heads of qkv [n, heads * width], in place.

    cos and signed_sin [n, rotary]: the first dimensions of a head turn, the others stay.
    """
    rotary = cos.shape[1]
    half = rotary // 2
    flat = qkv.reshape(-1)
    for i in range(qkv.shape[0]):
        for h in range(heads):
            at = i * qkv.shape[1] + h * width
            for k in range(half):
                low, high = flat[at + k], flat[at + half + k]
                flat[at + k] = low * cos[i, k] + high * signed_sin[i, k]
                flat[at + half + k] = high * cos[i, half + k] + low * signed_sin[i, half + k]


@compiled
def activations(z, kind, gated, h):
    """h [n, width] = act(z) for z [n, width], and act(gate) · up for z [n, 2 width] that has gates, then ups."""
    width = h.shape[1]
    powers = np.empty(width, dtype=np.int32)
    for i in range(z.shape[0]):
        row, out = z[i], h[i]
        if kind == SILU:
            for k in range(width):
                out[k] = -row[k]
            exponentials(out, 0, width, powers)
            for k in range(width):
                out[k] = row[k] / (np.float32(1) + out[k])
        elif kind == GELU:
            for k in range(width):
                a = row[k]
                out[k] = np.float32(0.5) * a * (np.float32(1) + np.float32(math.erf(a * np.float32(math.sqrt(0.5)))))
        elif kind == GELU_TANH:
            inner = np.empty(width, dtype=np.float32)
            for k in range(width):
                a = row[k]
                inner[k] = np.float32(math.sqrt(2 / math.pi)) * (a + np.float32(0.044715) * a * a * a)
            hyperbolic_tangents(inner, width, out, powers)
            for k in range(width):
                out[k] = np.float32(0.5) * row[k] * (np.float32(1) + out[k])
        else:
            for k in range(width):
                out[k] = np.float32(0) if row[k] < 0 else row[k]
        if gated:
            for k in range(width):
                out[k] *= row[width + k]


@compiled
def cap_softly(x, cap):
    """x [n, width] ← cap tanh(x / cap), in place."""
    width = x.shape[1]
    scaled, out = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
    powers = np.empty(width, dtype=np.int32)
    for i in range(x.shape[0]):
        for k in range(width):
            scaled[k] = x[i, k] / cap
        hyperbolic_tangents(scaled, width, out, powers)
        for k in range(width):
            x[i, k] = out[k] * cap


@compiled
def row_dots(x, y, out):
    """out[i] = x_i · y_i for rows of x and y [n, width]."""
    width = x.shape[1]
    left, right = x.reshape(-1), y.reshape(-1)
    for i in range(x.shape[0]):
        out[i] = dot(left, i * width, right, i * width, width)
