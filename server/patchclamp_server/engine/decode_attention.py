"""Attention of rows that bring one token, on a CPU in float32: one pass over the keys and one over the values.

    z_h = Σ_j w_j v_j / Σ_j w_j,   w_j = exp(s_hj - max_j s_hj),   s_hj = cap(q_h · k_j · scale)

Keys and values are read where they are in the pool, once for all query heads of a KV head. The largest score is known
before the first exponential, so where heads look costs next to nothing (peaks.py). Each row is computed by itself: its
bits depend neither on its neighbours nor on the number of threads.

Milliseconds for the 30 layers of SmolLM2-135M (9 heads over 3, dim 64), 2 cores, against gathering the blocks and
torch's scaled_dot_product_attention:

    rows x context     this    this with peaks    torch
         1 x  512       3.9                4.0      6.5
         1 x 1536      10.0               10.0     16.2
         8 x  512      29.3               29.6     50.2
         8 x 1536      92.7               92.8    178.2

Compiled once and cached on disk like the products of model/quantized.py. NaN and infinities are values like any other.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="no-untyped-call, no-untyped-def"

import math
from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.attention import AttentionBatch
from patchclamp_server.engine.peaks import LayerPeaks
from patchclamp_server.model.sparse.memory import in_parts

# exp(x) = 2^n exp(r), r = x - n ln 2 in two parts, exp(r) by the polynomial of Cephes' expf; error below 2 ulp.
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87.0)  # whose exponential is just normal
_NONE = np.empty((0, 0, 0), dtype=np.float32)
_NO_PEAKS = np.empty((0, 0, 0), dtype=np.int32), _NONE, None


def attend_single_rows(
    q: Tensor,
    pool: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    peaks: LayerPeaks | None,
) -> Tensor:
    """z [n, n_heads * head_dim] of the n single rows of a batch. q [n, n_heads, head_dim]; the pool of the layer
    [2, n_blocks, block_size, n_kv_heads, head_dim] holds their keys already."""
    n, n_heads, dim = q.shape
    z = np.empty((n, n_heads * dim), dtype=np.float32)
    where, share, off_sink = _NO_PEAKS if peaks is None or peaks.arrays is None else peaks.arrays
    arguments = (
        q.contiguous().numpy(),
        pool.numpy(),
        batch.tables,
        batch.positions,
        np.float32(scale),
        window,
        np.float32(soft_cap),
        z,
        where,
        share,
        _NONE if off_sink is None else off_sink,
        0 if peaks is None else peaks.place,
    )
    in_parts(partial(_attend, *arguments), n, 1, batch.n_keys * 2 * pool.shape[3] * dim * z.itemsize)
    return torch.from_numpy(z)


@numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)
def _attend(q, pool, tables, positions, scale, window, cap, z, peak_at, peak, off_sink, place, start, end):
    # The loops over heads count from 0: from kv * group on, LLVM makes vectors of none of those inside (2.5x slower).
    n_heads, dim = q.shape[1], q.shape[2]
    size, n_kv = pool.shape[2], pool.shape[3]
    group = n_heads // n_kv
    longest = tables.shape[1] * size
    scores = np.empty((n_heads, longest), dtype=np.float32)
    powers = np.empty(longest, dtype=np.int32)
    largest = np.empty(n_heads, dtype=np.float32)
    at = np.empty(n_heads, dtype=np.int32)
    for i in range(start, end):
        last = positions[i]
        first = max(0, last - window + 1) if window else 0
        largest[:] = -np.inf
        at[:] = first
        for b in range(first // size, last // size + 1):
            block = tables[i, b]
            for j in range(max(first, b * size), min(last + 1, (b + 1) * size)):
                for kv in range(n_kv):
                    for g in range(group):
                        h = kv * group + g
                        score = np.float32(0)
                        for d in range(dim):
                            score += q[i, h, d] * pool[0, block, j - b * size, kv, d]
                        score *= scale
                        if cap > 0:
                            score = np.float32(math.tanh(score / cap)) * cap
                        scores[h, j] = score
                        if score > largest[h]:
                            largest[h] = score
                            at[h] = j
        for h in range(n_heads):
            largest[h] = _softmax_weights(scores[h, first : last + 1], largest[h], powers)
        z[i, :] = 0
        for b in range(first // size, last // size + 1):
            block = tables[i, b]
            for j in range(max(first, b * size), min(last + 1, (b + 1) * size)):
                for kv in range(n_kv):
                    for g in range(group):
                        h = kv * group + g
                        weight = scores[h, j]
                        for d in range(dim):
                            z[i, h * dim + d] += weight * pool[1, block, j - b * size, kv, d]
        for h in range(n_heads):
            # The largest weight is exp(0).
            share = np.float32(1) / largest[h]
            for d in range(dim):
                z[i, h * dim + d] *= share
            if peak.shape[0]:
                peak_at[place, i, h] = at[h]
                peak[place, i, h] = share
                if off_sink.shape[0]:
                    # Unless the head looks at the first token, its peak is off the sink.
                    off_sink[place, i, h] = share if at[h] else share * _largest(scores[h, 1 : last + 1], powers)


@numba.njit(nogil=True, cache=True)
def _largest(weights, scratch):
    """Of weights from 0 to 1, whose order is that of their bits: integers are compared as vectors, NaN or not."""
    bits = weights.view(np.int32)
    most = np.int32(0)
    for j in range(bits.shape[0]):
        most = max(most, bits[j])
    scratch[0] = most
    return scratch.view(np.float32)[0]


@numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)
def _softmax_weights(scores, largest, powers):
    """scores ← exp(scores - largest), and their sum. Loops of plain arithmetic: they become vectors."""
    n = scores.shape[0]
    power = powers.view(np.float32)
    for j in range(n):
        x = scores[j] - largest
        # So that NaN stays.
        x = _SMALLEST if x < _SMALLEST else x
        e = np.floor(x * _LOG2_E + np.float32(0.5))
        r = x - e * _LN2_HIGH - e * _LN2_LOW
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        scores[j] = p * r * r + r + np.float32(1)
        powers[j] = (np.int32(e) + np.int32(127)) << np.int32(23)
    total = np.float32(0)
    for j in range(n):
        weight = scores[j] * power[j]
        scores[j] = weight
        total += weight
    return total
