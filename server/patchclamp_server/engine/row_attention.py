"""Attention on a CPU in float32, of decoding rows and of chunks of prompts alike: every row by itself, in one order.

    z_h = Σ_j w_j v_j / Σ_j w_j,   w_j = exp(s_hj - max_j s_hj),   s_hj = cap(q_h · k_j · scale)

Rows of one sequence that follow each other form a tile, so that keys and values are read once for all of them and for
all query heads of a KV head, where they are in the pool. Keys are taken 16 at a time from the beginning of the
sequence, whatever the tile: the bits of a row depend neither on its neighbours, nor on where its prompt was cut into
chunks, nor on the number of threads. Scores are kept for one tile and KV head, no attention matrix is. The largest
score is known before the first exponential, so where heads look costs next to nothing (peaks.py).

Compiled once and cached on disk; a change in model/invariant/tiles.py needs one here. NaN and infinities are values
like any other.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def"

import math
from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.attention import AttentionBatch
from patchclamp_server.engine.peaks import LayerPeaks
from patchclamp_server.model.invariant.rows import exponentials
from patchclamp_server.model.invariant.tiles import add_values, dot_keys, largest_of, sum_of
from patchclamp_server.model.sparse.memory import in_parts

_KEYS = 16  # that are scored at once: the lanes of a vector
_NO_PEAKS = np.empty((0, 0, 0), dtype=np.int32), np.empty((0, 0, 0), dtype=np.float32)

_compiled = numba.njit(nogil=True, cache=True)


def attend_rows(
    q: Tensor,
    pool: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    peaks: LayerPeaks | None,
) -> Tensor:
    """z [T, n_heads * head_dim] of all rows of a batch. q [T, n_heads, head_dim]; the pool of the layer
    [2, n_blocks, block_size, n_kv_heads, head_dim] holds their keys already."""
    n, n_heads, dim = q.shape
    z = np.empty((n, n_heads * dim), dtype=np.float32)
    where, share = _NO_PEAKS if peaks is None or peaks.arrays is None else peaks.arrays
    arguments = (
        q.contiguous().view(-1).numpy(),
        pool.numpy(),
        batch.tables,
        batch.tiles,
        np.float32(scale),
        window,
        np.float32(soft_cap),
        z,
        where,
        share,
        0 if peaks is None else peaks.place,
    )
    in_parts(partial(_attend, *arguments), len(batch.tiles), 1, batch.n_keys * 2 * pool.shape[3] * dim * z.itemsize)
    return torch.from_numpy(z)


@_compiled
def _attend(q, pool, tables, tiles, scale, window, cap, z, peak_at, peak, place, start, end):
    size, n_kv, dim = pool.shape[2], pool.shape[3], pool.shape[4]
    n_heads = z.shape[1] // dim
    group = n_heads // n_kv
    values_at = pool.shape[1] * size * n_kv * dim
    flat = pool.reshape(-1)
    # Keys that do not lie in a block 16 by 16, or are no whole vectors, are copied to where they do.
    width = (dim + _KEYS - 1) // _KEYS * _KEYS
    in_place = size % _KEYS == 0 and width == dim
    copied = np.zeros(_KEYS * width, dtype=np.float32)
    most = 0
    longest = 0
    for i in range(start, end):
        most = max(most, tiles[i, 2] * group)
        longest = max(longest, tiles[i, 3] + tiles[i, 2])
    longest = (longest + _KEYS - 1) // _KEYS * _KEYS
    queries = np.zeros(most * width, dtype=np.float32)
    scores = np.empty(most * longest, dtype=np.float32)
    sums = np.empty(most * width, dtype=np.float32)
    total = np.empty(most, dtype=np.float32)
    powers = np.empty(longest, dtype=np.int32)
    for i in range(start, end):
        sequence, row, rows, position = tiles[i, 0], tiles[i, 1], tiles[i, 2], tiles[i, 3]
        n = rows * group
        end_key = position + rows
        # Of the row that sees the earliest keys.
        first_chunk = (max(0, position - window + 1) if window else 0) // _KEYS
        n_chunks = (end_key + _KEYS - 1) // _KEYS - first_chunk
        for kv in range(n_kv):
            for v in range(n):
                at = ((row + v // group) * n_heads + kv * group + v % group) * dim
                for d in range(dim):
                    queries[v * width + d] = q[at + d]
            for c in range(n_chunks):
                key = (first_chunk + c) * _KEYS
                if in_place:
                    here = ((tables[sequence, key // size] * size + key % size) * n_kv + kv) * dim
                    for v in range(n):
                        dot_keys(queries, v * width, flat, here, n_kv * dim, width, scores, v * longest + c * _KEYS)
                else:
                    _copy(flat, 0, tables[sequence], size, n_kv, kv, dim, key, end_key, copied, width)
                    for v in range(n):
                        dot_keys(queries, v * width, copied, 0, width, width, scores, v * longest + c * _KEYS)
            for v in range(n):
                last = position + v // group - first_chunk * _KEYS
                first = max(0, last - window + 1) if window else 0
                at = v * longest
                largest = _scale(scores, at, first, last, n_chunks * _KEYS, scale, cap)
                if peak.shape[0]:
                    h = kv * group + v % group
                    j = first
                    # A NaN is nowhere the largest.
                    while j < last and scores[at + j] != largest:
                        j += 1
                    peak_at[place, row + v // group, h] = first_chunk * _KEYS + j
                total[v] = _softmax_weights(scores, at, first, last, n_chunks * _KEYS, largest, powers)
            sums[: n * width] = 0
            for c in range(n_chunks):
                key = (first_chunk + c) * _KEYS
                if in_place:
                    here = values_at + ((tables[sequence, key // size] * size + key % size) * n_kv + kv) * dim
                    stride = n_kv * dim
                    _add_chunk(scores, longest, flat, here, stride, width, sums, n, group, position, window, key, c)
                else:
                    _copy(flat, values_at, tables[sequence], size, n_kv, kv, dim, key, end_key, copied, width)
                    _add_chunk(scores, longest, copied, 0, width, width, sums, n, group, position, window, key, c)
            for v in range(n):
                h = kv * group + v % group
                # The largest weight is exp(0).
                share = np.float32(1) / total[v]
                for d in range(dim):
                    z[row + v // group, h * dim + d] = sums[v * width + d] * share
                if peak.shape[0]:
                    peak[place, row + v // group, h] = share


@_compiled
def _copy(pool, at, table, size, n_kv, kv, dim, key, end_key, copied, width):
    """Up to 16 keys or values of a sequence, side by side; what follows the last one means nothing."""
    for j in range(min(_KEYS, end_key - key)):
        here = at + ((table[(key + j) // size] * size + (key + j) % size) * n_kv + kv) * dim
        for d in range(dim):
            copied[j * width + d] = pool[here + d]


@_compiled
def _scale(scores, at, first, last, n, scale, cap):
    """scores ← cap(scores · scale) from `first` to `last`, -inf in the others of the n, and the largest."""
    for j in range(at + first, at + last + 1):
        scores[j] *= scale
    if cap > 0:
        for j in range(at + first, at + last + 1):
            scores[j] = np.float32(math.tanh(scores[j] / cap)) * cap
    _fill_hidden(scores, at, first, last, n, np.float32(-np.inf))
    return largest_of(scores, at, n)


@_compiled
def _softmax_weights(scores, at, first, last, n, largest, powers):
    """scores ← exp(scores - largest) from `first` to `last`, 0 in the others of the n, and their sum: that of each of
    16 lanes, and these by halves."""
    for j in range(at, at + n):
        scores[j] -= largest
    exponentials(scores, at, n, powers)
    _fill_hidden(scores, at, first, last, n, np.float32(0))
    return sum_of(scores, at, n)


@_compiled
def _fill_hidden(scores, at, first, last, n, value):
    for j in range(at, at + first):
        scores[j] = value
    for j in range(at + last + 1, at + n):
        scores[j] = value


@_compiled
def _add_chunk(scores, longest, values, here, stride, width, sums, n, group, position, window, key, c):
    """Adds 16 keys' share to the sums of all rows, of each row those it sees: four rows at once where they are all."""
    v = 0
    while v < n:
        first = key
        if window:
            first = max(first, position + min(v + 3, n - 1) // group - window + 1)
        whole = v + 4 <= n and position + v // group >= key + _KEYS - 1 and first == key
        at = v * longest + c * _KEYS
        if whole:
            w = (at, at + longest, at + 2 * longest, at + 3 * longest)
            y = (v * width, (v + 1) * width, (v + 2) * width, (v + 3) * width)
            add_values(scores, w, _KEYS, values, here, stride, width, sums, y)
            v += 4
            continue
        own = position + v // group
        begin = max(0, own - window + 1 - key) if window else 0
        n_keys = min(_KEYS, own - key + 1) - begin
        if n_keys > 0:
            add_values(scores, (at + begin,), n_keys, values, here + begin * stride, stride, width, sums, (v * width,))
        v += 1
