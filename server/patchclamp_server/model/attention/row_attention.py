"""Attention on a CPU in float32 computes every row by itself in one order, in decoding and in prompt chunks alike.

    z_h = Σ_j w_j v_j / Σ_j w_j,   w_j = exp(s_hj - max_j s_hj),   s_hj = cap(q_h · k_j · scale)

Rows of one sequence that follow each other form a tile, so that keys and values are read once for all of them and for
all query heads of a KV head, where they are in the pool. Keys are taken 16 at a time from the beginning of the
sequence, whatever the tile: the bits of a row depend neither on its neighbours, nor on where its prompt was cut into
chunks, nor on the number of threads. Scores are kept for one tile and KV head; no attention matrix is kept. The largest
score is known before the first exponential, so the peaks of heads (peaks.py) cost next to nothing.

numba compiles this once and caches it on disk; a change in cpu/invariant/tiles.py needs a change here. NaN and
infinities are values like any other.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def"

import math
from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant.rows import exponentials
from patchclamp_server.cpu.invariant.tiles import add_values, dot_keys, largest_of, sum_of
from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.vector import LINE, prefetch
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.peaks import LayerPeaks

_KEYS = 16  # keys that are scored at once: the lanes of a vector
_NONE = np.empty((0, 0, 0), dtype=np.float32)
_NO_PEAKS = np.empty((0, 0, 0), dtype=np.int32), _NONE, None

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


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
    """Returns z [T, n_heads * head_dim] of all rows of a batch, from q [T, n_heads, head_dim]. The layer's pool
    [2, n_blocks, block_size, n_kv_heads, head_dim] holds their keys and values already."""
    n, n_heads, dim = q.shape
    z = np.empty((n, n_heads * dim), dtype=np.float32)
    where, share, off_sink = _NO_PEAKS if peaks is None or peaks.arrays is None else peaks.arrays
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
        _NONE if off_sink is None else off_sink,
        0 if peaks is None else peaks.place,
        0,
        pool.shape[3],
    )
    in_parts(partial(attend, *arguments), len(batch.tiles), 1, batch.n_keys * 2 * pool.shape[3] * dim * z.itemsize)
    return torch.from_numpy(z)


@_compiled
def attend(q, pool, tables, tiles, scale, window, cap, z, peak_at, peak, off_sink, place, kv_start, kv_end, start, end):
    """Attends for the tiles start ≤ i < end, with the heads of KV heads kv_start ≤ kv < kv_end."""
    size, n_kv, dim = pool.shape[2], pool.shape[3], pool.shape[4]
    n_heads = z.shape[1] // dim
    group = n_heads // n_kv
    values_at = pool.shape[1] * size * n_kv * dim
    flat = pool.reshape(-1)
    # Keys that do not lie in a block 16 by 16, or are not whole vectors, are copied to where they do.
    width = (dim + _KEYS - 1) // _KEYS * _KEYS
    in_place = size % _KEYS == 0 and width == dim
    copied = np.zeros(_KEYS * width, dtype=np.float32)
    most = 0
    longest = 0
    for i in range(start, end):
        # A single row reads the keys of all heads, which lie together; more rows read those of one head repeatedly.
        most = max(most, n_heads if tiles[i, 2] == 1 else tiles[i, 2] * group)
        longest = max(longest, tiles[i, 3] + tiles[i, 2])
    # This is an odd number of cache lines: otherwise the same key of all rows would share few places of the cache.
    longest = ((longest + _KEYS - 1) // _KEYS | 1) * _KEYS
    queries = np.zeros(most * width, dtype=np.float32)
    scores = np.empty(most * longest, dtype=np.float32)
    sums = np.empty(most * width, dtype=np.float32)
    total = np.empty(most, dtype=np.float32)
    powers = np.empty(longest, dtype=np.int32)
    for i in range(start, end):
        sequence, row, rows, position = tiles[i, 0], tiles[i, 1], tiles[i, 2], tiles[i, 3]
        n = rows * group
        together = kv_end - kv_start if rows == 1 else 1
        end_key = position + rows
        # This is the first chunk of the row that sees the earliest keys.
        first_chunk = (max(0, position - window + 1) if window else 0) // _KEYS
        n_chunks = (end_key + _KEYS - 1) // _KEYS - first_chunk
        for first_kv in range(kv_start, kv_end, together):
            for v in range(n * together):
                h = (first_kv + v // n) * group + v % group
                at = ((row + v % n // group) * n_heads + h) * dim
                for d in range(dim):
                    queries[v * width + d] = q[at + d]
            for c in range(n_chunks):
                key = (first_chunk + c) * _KEYS
                if in_place and rows == 1 and c + 1 < n_chunks:
                    _ask_for(flat, 0, tables[sequence], size, n_kv * dim, key + _KEYS)
                for kv in range(first_kv, first_kv + together):
                    if in_place:
                        here = ((tables[sequence, key // size] * size + key % size) * n_kv + kv) * dim
                        source, stride = flat, n_kv * dim
                    else:
                        _copy(flat, 0, tables[sequence], size, n_kv, kv, dim, key, end_key, copied, width)
                        source, here, stride = copied, 0, width
                    begin = (kv - first_kv) * n
                    for v in range(begin, begin + n):
                        dot_keys(queries, v * width, source, here, stride, width, scores, v * longest + c * _KEYS)
            for v in range(n * together):
                own = scores[v * longest : v * longest + n_chunks * _KEYS]
                last = position + v % n // group - first_chunk * _KEYS
                first = max(0, last - window + 1) if window else 0
                largest = _scale(own, first, last, scale, cap)
                if peak.shape[0]:
                    j = first
                    # If every score is NaN, no key equals the largest, and the search ends at `last`.
                    while j < last and own[j] != largest:
                        j += 1
                    h = (first_kv + v // n) * group + v % group
                    peak_at[place, row + v % n // group, h] = first_chunk * _KEYS + j
                total[v] = _softmax_weights(own, first, last, largest, powers)
            sums[: n * together * width] = 0
            for c in range(n_chunks):
                key = (first_chunk + c) * _KEYS
                if in_place and rows == 1 and c + 1 < n_chunks:
                    _ask_for(flat, values_at, tables[sequence], size, n_kv * dim, key + _KEYS)
                for kv in range(first_kv, first_kv + together):
                    v = (kv - first_kv) * n
                    if in_place:
                        here = values_at + ((tables[sequence, key // size] * size + key % size) * n_kv + kv) * dim
                        source, stride = flat, n_kv * dim
                    else:
                        _copy(flat, values_at, tables[sequence], size, n_kv, kv, dim, key, end_key, copied, width)
                        source, here, stride = copied, 0, width
                    _add_chunk(
                        scores, longest, source, here, stride, width, sums, v, n, group, position, window, key, c
                    )
            for v in range(n * together):
                h = (first_kv + v // n) * group + v % group
                # The largest weight is exp(0).
                share = np.float32(1) / total[v]
                for d in range(dim):
                    z[row + v % n // group, h * dim + d] = sums[v * width + d] * share
                if peak.shape[0]:
                    peak[place, row + v % n // group, h] = share
                if off_sink.shape[0]:
                    if not peak_at[place, row + v % n // group, h]:
                        # The head's peak is the first token: its peak off the sink is the largest other weight.
                        own = scores[v * longest : v * longest + n_chunks * _KEYS]
                        own[0] = np.float32(0)
                        share *= largest_of(own, 0, own.shape[0])
                    off_sink[place, row + v % n // group, h] = share


@_compiled
def _ask_for(pool, at, table, size, stride, key):
    """Prefetches 16 keys or values of all heads, because reading them head by head jumps through memory."""
    here = at + (table[key // size] * size + key % size) * stride
    prefetch(pool, here, _KEYS * stride * 4 // LINE)


@_compiled
def _copy(pool, at, table, size, n_kv, kv, dim, key, end_key, copied, width):
    """Copies up to 16 keys or values of a sequence side by side; what follows the last one means nothing."""
    for j in range(min(_KEYS, end_key - key)):
        here = at + ((table[(key + j) // size] * size + (key + j) % size) * n_kv + kv) * dim
        for d in range(dim):
            copied[j * width + d] = pool[here + d]


@_compiled
def _scale(scores, first, last, scale, cap):
    """Sets scores ← cap(scores · scale) from `first` to `last`, -inf in the others, and returns the largest."""
    # Indices count from 0, here and below: numba takes an index that may be negative as one from the end, and LLVM does
    # not vectorise those.
    n = scores.shape[0]
    for j in range(n):
        scores[j] *= scale
    if cap > 0:
        for j in range(first, last + 1):
            scores[j] = np.float32(math.tanh(scores[j] / cap)) * cap
    _fill_hidden(scores, first, last, np.float32(-np.inf))
    return largest_of(scores, 0, n)


@_compiled
def _softmax_weights(scores, first, last, largest, powers):
    """Sets scores ← exp(scores - largest) from `first` to `last`, 0 in the others, and returns their sum, which adds
    each of 16 lanes and then these by halves."""
    n = scores.shape[0]
    for j in range(n):
        scores[j] -= largest
    exponentials(scores, powers)
    _fill_hidden(scores, first, last, np.float32(0))
    return sum_of(scores, 0, n)


@_compiled
def _fill_hidden(scores, first, last, value):
    scores[:first] = value
    scores[last + 1 :] = value


@_compiled
def _add_chunk(scores, longest, values, here, stride, width, sums, start, n, group, position, window, key, c):
    """Adds 16 values to the sums of n queries, for each those that it sees: four queries at once that see all."""
    v = 0
    while v < n:
        own = position + v // group
        at = (start + v) * longest + c * _KEYS
        z = (start + v) * width
        latest = position + min(v + 3, n - 1) // group
        if v + 4 <= n and own >= key + _KEYS - 1 and not (window and latest - window + 1 > key):
            w = (at, at + longest, at + 2 * longest, at + 3 * longest)
            four = (z, z + width, z + 2 * width, z + 3 * width)
            add_values(scores, w, _KEYS, values, here, stride, width, sums, four)
            v += 4
            continue
        begin = max(0, own - window + 1 - key) if window else 0
        n_keys = min(_KEYS, own - key + 1) - begin
        if n_keys > 0:
            add_values(scores, (at + begin,), n_keys, values, here + begin * stride, stride, width, sums, (z,))
        v += 1
