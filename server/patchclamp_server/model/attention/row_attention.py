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

numba compiles this once and caches it on disk; a change in chunks.py, tiled.py or cpu/invariant/attention.py needs
a change here. NaN and infinities are values like any other.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="attr-defined, call-arg, no-untyped-call, no-untyped-def"

from functools import partial

import numpy as np
import torch
from numba import carray
from torch import Tensor

from patchclamp_server.cpu.atomics import add_to, floats_at, keep
from patchclamp_server.cpu.invariant.attention import exponentials_from
from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.vector import LINE
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.chunks import (
    LARGEST,
    REST,
    TOTAL,
    WHERE,
    attend_chunk,
    compiled,
    pack_queries,
)
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
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.attention.tiled import ask_for_scales, copy_tiles, find_scales, find_tiles, write_rows

_TILES = CHUNK // LANES
# So many queries that read the same keys are worth a copy of them in float32.
_WORTH_A_COPY = 8
_NONE = np.empty((0, 0, 0), dtype=np.float32)
_NO_PEAKS = np.empty((0, 0, 0), dtype=np.int32), _NONE, None


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


def warm_up(pool: TiledPool) -> None:
    """Compiles all of this for such a pool. Of a block that stays zero, the first, it writes zeros."""
    row = torch.zeros(1, pool.n_kv_heads, pool.dim)
    first = torch.zeros(1, dtype=torch.int64)
    write(row, row, first, pool)
    batch = AttentionBatch([Span(0, 1, 0, [0])], pool.block_size, {0}, first.device)
    attend_rows(row, pool, batch, scale=1.0, window=0, soft_cap=0.0, peaks=None)


@compiled
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
    total = 0
    for length in sizes:
        total += length
    owned = np.empty(total + LANES, dtype=np.float32)
    # Parts of an array that owns its memory count their references, which takes longer than what is done with them.
    address = np.int64(owned.ctypes.data)
    memory, first = carray(floats_at(address + -address % LINE), (total,)), 0
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
    # Behind the tiles of a chunk of keys are those of the next one, to be prefetched.
    key_at, value_at = np.zeros(2 * _TILES, dtype=np.int64), np.empty(2 * _TILES, dtype=np.int64)
    for i in range(start, end):
        part = parts[i]
        tile = tiles[part[TILE]]
        table, row, rows, position = tables[tile[0]], tile[1], tile[2], tile[3]
        n = rows * group
        copies = size % LANES != 0 or (keys.itemsize < 4 and n >= _WORTH_A_COPY)
        # This is the first chunk of the row that sees the earliest keys.
        earliest = (max(0, position - window + 1) if window else 0) // CHUNK
        shared = part[COUNTER] >= 0
        for kv in range(part[FIRST_KV], part[LAST_KV]):
            pack_queries(q, row, rows, n_heads, kv * group, group, dim, queries)
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
                    attend_chunk(
                        queries, key_copy, value_copy, key_at, value_at, coded, scales, tiles_here, sight, dim, width,
                        scale, cap, scores, own, wanted,
                    )  # fmt: skip
                else:
                    find_tiles(table, size, n_kv, kv, dim, width, first_key, tiles_here, key_at, value_at)
                    if rows == 1 and chunk + 1 < part[LAST_CHUNK]:
                        more = min(_TILES, (position - end_key + LANES) // LANES)
                        find_tiles(table, size, n_kv, kv, dim, width, end_key, more, key_at[_TILES:], value_at[_TILES:])
                        if coded:
                            end_of_more = min(position + rows, end_key + CHUNK)
                            ask_for_scales(table, size, n_kv, kv, end_key, end_of_more, key_scales, value_scales)
                    attend_chunk(
                        queries, keys, values, key_at, value_at, coded, scales, tiles_here, sight, dim, width, scale,
                        cap, scores, own, wanted,
                    )  # fmt: skip
                for v in range(n):
                    own[v * record + width + WHERE] += first_key
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
                share = np.float32(1) / numbers[TOTAL]
                for d in range(dim):
                    z[i_row, h * dim + d] = merged[v * record + d] * share
                if peak.shape[0]:
                    where = np.int32(numbers[WHERE])
                    peak_at[place, i_row, h], peak[place, i_row, h] = where, share
                    if off_sink.shape[0]:
                        if where == 0:
                            # The head's peak is the first token: its peak off the sink is the largest other weight.
                            pair[0] = numbers[REST]
                            exponentials_from(pair, 0, LANES, numbers[LARGEST])
                            share *= pair[0]
                            pair[:] = 0
                        off_sink[place, i_row, h] = share
    keep(owned)


@compiled
def _merge(merged, own, at, n, width, is_first, pair):
    """Merges the records of a chunk, which begin at own[at], with those of all chunks before it."""
    record = width + RECORD
    if is_first:
        merged[: n * record] = own[at : at + n * record]
        return
    for v in range(n):
        before, new = v * record, at + v * record
        if own[new + width + TOTAL] == -1:
            continue
        if merged[before + width + TOTAL] == -1:
            merged[before : before + record] = own[new : new + record]
            continue
        numbers, others = merged[before + width : before + record], own[new + width : new + record]
        m, other = numbers[LARGEST], others[LARGEST]
        if other > m:
            numbers[LARGEST], numbers[WHERE] = other, others[WHERE]
        numbers[REST] = max(numbers[REST], others[REST])
        pair[0], pair[1] = m, other
        largest = numbers[LARGEST]
        exponentials_from(pair, 0, LANES, largest if largest > -np.inf else np.float32(0))
        a, b = pair[0], pair[1]
        pair[2:] = 0
        numbers[TOTAL] = numbers[TOTAL] * a + others[TOTAL] * b
        sums, more = merged[before : before + width], own[new : new + width]
        for k in range(width):
            sums[k] = sums[k] * a + more[k] * b
