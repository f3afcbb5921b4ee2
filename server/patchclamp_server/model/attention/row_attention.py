"""Attention on a CPU in float32 computes every row by itself in one order, in decoding and in prompt chunks alike.

    z_h = Σ_j w_j v_j / Σ_j w_j,   w_j = exp(s_hj - max_j s_hj),   s_hj = cap(q_h · k_j · scale)

Keys are taken in chunks of 256 from the beginning of the sequence. A chunk c has its own largest score m_c, sum
l_c = Σ exp(s_j - m_c) and o_c = Σ exp(s_j - m_c) v_j, and chunks are merged one after the other (flash attention: Dao
2023), from the first on:

    m = max(m, m_c);  l ← l exp(m_before - m) + l_c exp(m_c - m);  o likewise;  z = o / l

Rows of one sequence that follow each other form a tile, so that keys and values are read once for all of them and for
all query heads of a KV head. Chunks of one tile may be computed by different threads (parts.py); whoever is last merges
them in their order. So the bits of a row depend neither on its neighbours, nor on where its prompt was cut into chunks,
nor on the number of threads. No row of scores is kept, and the peaks of heads (peaks.py) cost next to nothing.

numba compiles this once and caches it on disk; a change in cpu/invariant/attention.py, cpu/vector.py or tiled.py needs
a change here. NaN and infinities are values like any other.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def"

import math
from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.atomics import add_to
from patchclamp_server.cpu.invariant.attention import WIDE, add_values, exponentials_from, score_keys
from patchclamp_server.cpu.invariant.tiles import largest_of
from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.parts import (
    CHUNK,
    COUNTER,
    FIRST_CHUNK,
    FIRST_KV,
    LAST_CHUNK,
    LAST_KV,
    OF,
    RECORD,
    RECORDS,
    TILE,
)
from patchclamp_server.model.attention.peaks import LayerPeaks
from patchclamp_server.model.attention.pools import LANES, TiledPool
from patchclamp_server.model.attention.tiled import copy_tiles, find_scales, find_tiles, write_rows

_TILES = CHUNK // LANES
# So many queries that read the same keys are worth a copy of them in float32.
_WORTH_A_COPY = 8
_NONE = np.empty((0, 0, 0), dtype=np.float32)
_NO_PEAKS = np.empty((0, 0, 0), dtype=np.int32), _NONE, None
# The numbers of a record, behind its sums of values.
_LARGEST, _TOTAL, _REST, _WHERE = range(4)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


def write(k: Tensor, v: Tensor, slots: Tensor, pool: TiledPool) -> None:
    """Writes k and v [T, n_kv_heads, head_dim] at token addresses `slots` [T]."""
    write_rows(k.contiguous().numpy(), v.contiguous().numpy(), slots.numpy(), *pool.arrays, pool.block_size)


def attend_rows(
    q: Tensor,
    pool: TiledPool,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    peaks: LayerPeaks | None,
) -> Tensor:
    """Returns z [T, n_heads * head_dim] of all rows of a batch, from q [T, n_heads, head_dim]. The layer's pool holds
    their keys and values already."""
    n, n_heads, dim = q.shape
    n_kv = pool.n_kv_heads
    z = np.empty((n, n_heads * dim), dtype=np.float32)
    where, share, off_sink = _NO_PEAKS if peaks is None or peaks.arrays is None else peaks.arrays
    parts = batch.parts(n_kv, torch.get_num_threads())
    arguments = (
        q.contiguous().view(-1).numpy(),
        *pool.arrays,
        pool.block_size,
        n_kv,
        dim,
        batch.tables,
        batch.tiles,
        parts.items,
        *parts.memory(n_heads // n_kv, pool.width),
        np.float32(scale),
        window,
        np.float32(soft_cap),
        z,
        where,
        share,
        _NONE if off_sink is None else off_sink,
        0 if peaks is None else peaks.place,
    )
    in_parts(partial(attend, *arguments), len(parts.items), 1, batch.n_keys * 2 * n_kv * dim * z.itemsize)
    return torch.from_numpy(z)


@_compiled
def attend(
    q, keys, values, key_scales, value_scales, size, n_kv, dim, tables, tiles, parts, counters, records, scale, window,
    cap, z, peak_at, peak, off_sink, place, start, end,
):  # fmt: skip
    """Attends for the parts start ≤ i < end, and merges those tiles whose last part is among them."""
    n_heads = z.shape[1] // dim
    group = n_heads // n_kv
    width = (dim + LANES - 1) // LANES * LANES
    record = width + RECORD
    coded = keys.itemsize == 1
    most = 0
    for i in range(start, end):
        most = max(most, tiles[parts[i, TILE], 2] * group)
    copied = size % LANES != 0 or (keys.itemsize < 4 and most >= _WORTH_A_COPY)
    copy = CHUNK if copied else 0
    # All of this begins at cache lines.
    sizes = (most * width, most * CHUNK, most * record, most * record, 2 * CHUNK, LANES, copy * width, copy * width)
    memory = np.empty(sum(sizes) + LANES, dtype=np.float32)
    first = -memory.ctypes.data // 4 % LANES
    queries, first = memory[first : first + sizes[0]], first + sizes[0]
    scores, first = memory[first : first + sizes[1]], first + sizes[1]
    own, first = memory[first : first + sizes[2]], first + sizes[2]
    merged, first = memory[first : first + sizes[3]], first + sizes[3]
    scales, first = memory[first : first + sizes[4]], first + sizes[4]
    pair, first = memory[first : first + sizes[5]], first + sizes[5]
    key_copy, first = memory[first : first + sizes[6]], first + sizes[6]
    value_copy = memory[first : first + sizes[7]]
    pair[:] = 0
    scales[:] = 1
    key_at, value_at = np.empty(_TILES, dtype=np.int64), np.empty(_TILES, dtype=np.int64)
    for i in range(start, end):
        part = parts[i]
        sequence, row, rows, position = tiles[part[TILE]]
        table = tables[sequence]
        n = rows * group
        copies = size % LANES != 0 or (keys.itemsize < 4 and n >= _WORTH_A_COPY)
        # This is the first chunk of the row that sees the earliest keys.
        earliest = (max(0, position - window + 1) if window else 0) // CHUNK
        shared = part[COUNTER] >= 0
        for kv in range(part[FIRST_KV], part[LAST_KV]):
            _pack_queries(q, row, rows, n_heads, kv * group, group, dim, queries)
            for chunk in range(max(earliest, part[FIRST_CHUNK]), part[LAST_CHUNK]):
                first_key = chunk * CHUNK
                end_key = min(position + rows, first_key + CHUNK)
                tiles_here = (end_key - first_key + LANES - 1) // LANES
                if coded:
                    find_scales(table, size, n_kv, kv, first_key, end_key, key_scales, value_scales, scales)
                sight = (position - first_key, rows, group, window)
                wanted = (peak.shape[0] > 0, off_sink.shape[0] > 0 and chunk == 0)
                if copies:
                    copy_tiles(
                        table, size, n_kv, kv, dim, width, first_key, end_key, keys, values, key_copy, value_copy
                    )
                    for t in range(tiles_here):
                        key_at[t], value_at[t] = t * LANES * dim, t * LANES * width
                    _attend_chunk(
                        queries, key_copy, value_copy, key_at, value_at, coded, scales, tiles_here, sight, dim, width,
                        scale, cap, scores, own, wanted,
                    )  # fmt: skip
                else:
                    find_tiles(table, size, n_kv, kv, dim, width, first_key, tiles_here, key_at, value_at)
                    _attend_chunk(
                        queries, keys, values, key_at, value_at, coded, scales, tiles_here, sight, dim, width, scale,
                        cap, scores, own, wanted,
                    )  # fmt: skip
                for v in range(n):
                    own[v * record + width + _WHERE] += first_key
                if shared:
                    at = (part[RECORDS] * group + chunk * n) * record
                    records[at : at + n * record] = own[: n * record]
                else:
                    _merge(merged, own, 0, n, width, chunk == earliest, pair)
            if shared:
                if (add_to(counters, part[COUNTER], 1) + 1) % part[OF] != 0:
                    continue
                for chunk in range(earliest, (position + rows + CHUNK - 1) // CHUNK):
                    at = (part[RECORDS] * group + chunk * n) * record
                    _merge(merged, records, at, n, width, chunk == earliest, pair)
            for v in range(n):
                i_row, h = row + v // group, kv * group + v % group
                numbers = merged[v * record + width : (v + 1) * record]
                # The largest weight is exp(0).
                share = np.float32(1) / numbers[_TOTAL]
                for d in range(dim):
                    z[i_row, h * dim + d] = merged[v * record + d] * share
                if peak.shape[0]:
                    where = np.int32(numbers[_WHERE])
                    peak_at[place, i_row, h], peak[place, i_row, h] = where, share
                    if off_sink.shape[0]:
                        if where == 0:
                            # The head's peak is the first token: its peak off the sink is the largest other weight.
                            pair[0] = numbers[_REST]
                            exponentials_from(pair, 0, LANES, numbers[_LARGEST])
                            share *= pair[0]
                            pair[:] = 0
                        off_sink[place, i_row, h] = share


@_compiled
def _together(n):
    """Returns how many of n queries that are left are computed at once."""
    return 8 if WIDE and n >= 8 else 4 if n >= 4 else n


@_compiled
def _pack_queries(q, row, rows, n_heads, first_head, group, dim, out):
    """Sets out to the queries of one KV head by those that are computed at once, [dim, at once] each."""
    n, v = rows * group, 0
    while v < n:
        r = _together(n - v)
        for k in range(v, v + r):
            at = ((row + k // group) * n_heads + first_head + k % group) * dim
            for d in range(dim):
                out[v * dim + d * r + k - v] = q[at + d]
        v += r


@_compiled
def _attend_chunk(
    queries, keys, values, key_at, value_at, coded, scales, tiles, sight, dim, width, scale, cap, scores, out, wanted
):  # fmt: skip
    """Sets the records `out` of n queries of a chunk: the sums of exp(s - largest) v, the largest score, the sum of
    exp(s - largest), the largest score behind the first key, and the place of the largest in the chunk. A query that
    sees none of its keys has a total of -1."""
    position, rows, group, window = sight
    n, record = rows * group, width + RECORD
    begin = (max(0, position - window + 1) if window else 0) // LANES
    _score(queries, n, keys, key_at, begin, tiles, dim, scale, scales, scores)
    for v in range(n):
        at = v * CHUNK
        last = min(position + v // group, CHUNK - 1)
        first = max(0, position + v // group - window + 1) if window else 0
        for k in range(v * record, (v + 1) * record):
            out[k] = np.float32(0)
        numbers = out[v * record + width : (v + 1) * record]
        if last < first:
            numbers[_TOTAL] = np.float32(-1)
            continue
        for j in range(at + begin * LANES, at + first):
            scores[j] = np.float32(-np.inf)
        for j in range(at + last + 1, at + tiles * LANES):
            scores[j] = np.float32(-np.inf)
        if cap > 0:
            for j in range(at + first, at + last + 1):
                scores[j] = np.float32(math.tanh(scores[j] / cap)) * cap
        from_at, length = at + begin * LANES, (tiles - begin) * LANES
        if wanted[1] and first == 0:
            sink = scores[at]
            scores[at] = np.float32(-np.inf)
            rest = largest_of(scores, from_at, length)
            scores[at] = sink
            largest = sink if sink >= rest else rest
        else:
            largest = largest_of(scores, from_at, length)
            rest = largest
        if wanted[0]:
            j = first
            # If every score is NaN, no key equals the largest, and the search ends at `last`.
            while j < last and scores[at + j] != largest:
                j += 1
            numbers[_WHERE] = np.float32(j)
        numbers[_LARGEST], numbers[_REST] = largest, rest
        # If there is no largest score, all weights are 0 or NaN.
        base = largest if largest > -np.inf else np.float32(0)
        numbers[_TOTAL] = exponentials_from(scores, from_at, length, base)
        if coded:
            for j in range(begin * LANES, tiles * LANES):
                scores[at + j] *= scales[CHUNK + j]
    v = 0
    while v < n:
        r = 4 if n - v >= 4 else n - v
        low, high = v // group, (v + r - 1) // group
        # All of these queries see what lies between.
        begin_all = max(0, position + high - window + 1) if window else 0
        end_all = min(position + low, CHUNK - 1) + 1
        if r > 1 and end_all > begin_all:
            for k in range(v, v + r):
                begin_own = max(0, position + k // group - window + 1) if window else 0
                if begin_own < begin_all:
                    _add(scores, k, 1, values, value_at, begin_own, begin_all, width, out)
            _add(scores, v, r, values, value_at, begin_all, end_all, width, out)
            for k in range(v, v + r):
                end_own = min(position + k // group, CHUNK - 1) + 1
                if end_own > end_all:
                    _add(scores, k, 1, values, value_at, end_all, end_own, width, out)
        else:
            for k in range(v, v + r):
                begin_own = max(0, position + k // group - window + 1) if window else 0
                end_own = min(position + k // group, CHUNK - 1) + 1
                if end_own > begin_own:
                    _add(scores, k, 1, values, value_at, begin_own, end_own, width, out)
        v += r


@_compiled
def _score(q, n, keys, key_at, begin, end, dim, scale, scales, scores):
    """Sets the scores of n queries for tiles begin ≤ t < end; those of others in fours of tiles mean nothing."""
    v = 0
    while v < n:
        r = _together(n - v)
        at, q_at = v * CHUNK, v * dim
        for t in range(begin // 4 * 4, end, 4):
            k0, k1 = key_at[max(t, begin)], key_at[max(begin, min(t + 1, end - 1))]
            k2, k3 = key_at[max(begin, min(t + 2, end - 1))], key_at[min(t + 3, end - 1)]
            s, j = at + t * LANES, t * LANES
            if r == 1:
                score_keys(q, q_at, keys, (k0, k1, k2, k3), dim, scale, scales, j, scores, (s,))
            elif r == 2:
                score_keys(q, q_at, keys, (k0, k1, k2, k3), dim, scale, scales, j, scores, (s, s + CHUNK))
            elif r == 3:
                to = (s, s + CHUNK, s + 2 * CHUNK)
                score_keys(q, q_at, keys, (k0, k1, k2, k3), dim, scale, scales, j, scores, to)
            elif r == 4:
                to = (s, s + CHUNK, s + 2 * CHUNK, s + 3 * CHUNK)
                score_keys(q, q_at, keys, (k0, k1, k2, k3), dim, scale, scales, j, scores, to)
            else:
                to = (
                    s, s + CHUNK, s + 2 * CHUNK, s + 3 * CHUNK, s + 4 * CHUNK, s + 5 * CHUNK, s + 6 * CHUNK,
                    s + 7 * CHUNK,
                )  # fmt: skip
                score_keys(q, q_at, keys, (k0, k1), dim, scale, scales, j, scores, to)
                half = (
                    to[0] + 32, to[1] + 32, to[2] + 32, to[3] + 32, to[4] + 32, to[5] + 32, to[6] + 32, to[7] + 32
                )  # fmt: skip
                score_keys(q, q_at, keys, (k2, k3), dim, scale, scales, j + 32, scores, half)
        v += r


@_compiled
def _add(weights, v, r, values, value_at, begin, end, width, out):
    """Adds the values of keys begin ≤ j < end to the sums of r queries from v on."""
    w, z, record = v * CHUNK, v * (width + RECORD), width + RECORD
    if r == 1:
        add_values(weights, (w,), values, value_at, begin, end, width, out, (z,))
    elif r == 2:
        add_values(weights, (w, w + CHUNK), values, value_at, begin, end, width, out, (z, z + record))
    elif r == 3:
        at, to = (w, w + CHUNK, w + 2 * CHUNK), (z, z + record, z + 2 * record)
        add_values(weights, at, values, value_at, begin, end, width, out, to)
    else:
        four = (w, w + CHUNK, w + 2 * CHUNK, w + 3 * CHUNK)
        add_values(
            weights, four, values, value_at, begin, end, width, out, (z, z + record, z + 2 * record, z + 3 * record)
        )


@_compiled
def _merge(merged, own, at, n, width, is_first, pair):
    """Merges the records of a chunk, which begin at own[at], with those of all chunks before it."""
    record = width + RECORD
    if is_first:
        for k in range(n * record):
            merged[k] = own[at + k]
        return
    for v in range(n):
        before, new = v * record, at + v * record
        if own[new + width + _TOTAL] == -1:
            continue
        if merged[before + width + _TOTAL] == -1:
            for k in range(record):
                merged[before + k] = own[new + k]
            continue
        numbers, others = merged[before + width : before + record], own[new + width : new + record]
        m, other = numbers[_LARGEST], others[_LARGEST]
        if other > m:
            numbers[_LARGEST], numbers[_WHERE] = other, others[_WHERE]
        numbers[_REST] = max(numbers[_REST], others[_REST])
        pair[0], pair[1] = m, other
        largest = numbers[_LARGEST]
        exponentials_from(pair, 0, LANES, largest if largest > -np.inf else np.float32(0))
        a, b = pair[0], pair[1]
        pair[2:] = 0
        numbers[_TOTAL] = numbers[_TOTAL] * a + others[_TOTAL] * b
        for k in range(width):
            merged[before + k] = merged[before + k] * a + own[new + k] * b
