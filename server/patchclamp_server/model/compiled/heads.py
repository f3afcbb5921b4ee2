"""The stages of heads: norms and rotary embedding, keys and values into the pool, and attention.

numba compiles this and caches it on disk by this file alone: a change in row_attention.py or tiled.py needs one here,
and a change here one in stages.py.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, attr-defined"

import numba
from numba import carray

from patchclamp_server.cpu.atomics import codes_at, floats_at, halves_at, ints_at, places_at
from patchclamp_server.cpu.invariant.rows import finish_heads
from patchclamp_server.model.attention.pools import LANES
from patchclamp_server.model.attention.row_attention import attend
from patchclamp_server.model.attention.tiled import write_row
from patchclamp_server.model.compiled.job import LAYER_FIELDS, Job, Layer

# Chunks of attention for each thread, which are of unequal length.
_CHUNKS = 16
_LAYER_FIELDS = LAYER_FIELDS
_N, _N_HEADS, _N_KV, _DIM, _QKV_AT, _Q, _Z, _THREADS = (
    int(field) for field in (Job.ROWS, Job.N_HEADS, Job.N_KV_HEADS, Job.HEAD_DIM, Job.QKV, Job.Q, Job.Z, Job.THREADS)
)
_LAYERS, _EPSILONS, _CONSTANTS, _ROTARY, _CONTEXT, _POSITIONS, _SLOTS = (
    int(field) for field in (Job.LAYERS, Job.EPSILONS, Job.CONSTANTS, Job.ROTARY, Job.CONTEXT, Job.POSITIONS, Job.SLOTS)
)
_POOLS, _POOL_FORMAT, _POOL_TOKENS, _SIZE, _TABLES, _SPANS, _TABLE_WIDTH = (
    int(field)
    for field in (
        Job.POOLS, Job.POOL_FORMAT, Job.POOL_TOKENS, Job.BLOCK_SIZE, Job.TABLES, Job.SPANS, Job.TABLE_WIDTH
    )
)  # fmt: skip
_TILES, _N_TILES, _PARTS, _N_PARTS, _COUNTERS, _N_COUNTERS, _RECORDS, _N_RECORDS = (
    int(field)
    for field in (
        Job.ATTENTION_TILES, Job.N_ATTENTION_TILES, Job.PARTS, Job.N_PARTS, Job.PART_COUNTERS, Job.N_PART_COUNTERS,
        Job.RECORDS, Job.N_RECORDS,
    )
)  # fmt: skip
_PEAK_AT, _PEAK, _OFF_SINK, _PEAK_PLACES, _PEAK_OF_LAYER = (
    int(field) for field in (Job.PEAK_AT, Job.PEAK, Job.OFF_SINK, Job.PEAK_PLACES, Job.PEAK_OF_LAYER)
)
_HEAD_NORMS, _ROTARY_KIND, _WINDOW = (int(field) for field in (Layer.HEAD_NORMS, Layer.ROTARY_KIND, Layer.WINDOW))

_compiled = numba.njit(nogil=True, cache=True)


@_compiled
def attention_chunks(job):
    return min(job[_THREADS] * _CHUNKS, job[_N_PARTS])


@_compiled
def layer_fields(job, layer):
    return carray(ints_at(job[_LAYERS] + layer * (_LAYER_FIELDS * 8)), (_LAYER_FIELDS,))


@_compiled
def finish_rows(job, layer, start, end):
    n_heads, n_kv, dim, n = job[_N_HEADS], job[_N_KV], job[_DIM], job[_N]
    attended = n_heads + n_kv
    fields = layer_fields(job, layer)
    qkv = carray(floats_at(job[_QKV_AT]), (n, attended + n_kv, dim))
    q = carray(floats_at(job[_Q]), (n, n_heads, dim))
    positions, slots = carray(ints_at(job[_POSITIONS]), (n,)), carray(ints_at(job[_SLOTS]), (n,))
    normed = 0 if fields[_HEAD_NORMS] == 0 else attended
    weights = carray(floats_at(fields[_HEAD_NORMS]), (normed, dim))
    eps = carray(floats_at(job[_EPSILONS] + layer * 20), (5,))[4]
    kind, width, context = fields[_ROTARY_KIND], 0, 0
    cosines, sines = job[_CONSTANTS], job[_CONSTANTS]
    if kind >= 0:
        table = carray(ints_at(job[_ROTARY] + kind * 24), (3,))
        cosines, sines, width, context = table[0], table[1], table[2], job[_CONTEXT]
    cos, signed_sin = carray(floats_at(cosines), (context, width)), carray(floats_at(sines), (context, width))
    for i in range(start, end):
        p = positions[i] if kind >= 0 else 0
        if normed or kind >= 0:
            finish_heads(qkv[i : i + 1], attended, weights, eps, cos[p : p + 1], signed_sin[p : p + 1], 0, 1)
        for h in range(n_heads):
            for k in range(dim):
                q[i, h, k] = qkv[i, h, k]
        _write(job, layer, qkv[i, n_heads:attended], qkv[i, attended:], slots[i])


@_compiled
def _width(job):
    return (job[_DIM] + LANES - 1) // LANES * LANES


@_compiled
def _write(job, layer, k, v, slot):
    """Writes k and v [n_kv_heads, dim] to the pool of a layer."""
    pools = carray(ints_at(job[_POOLS]), (layer + 1, 4))
    keys, values, scales_at, value_scales_at = pools[layer, 0], pools[layer, 1], pools[layer, 2], pools[layer, 3]
    tokens = job[_POOL_TOKENS] * job[_N_KV]
    n_keys, n_values, size = tokens * job[_DIM], tokens * _width(job), job[_SIZE]
    coded = tokens if job[_POOL_FORMAT] == 1 else 0
    scales, value_scales = carray(floats_at(scales_at), (coded,)), carray(floats_at(value_scales_at), (coded,))
    if job[_POOL_FORMAT] == 4:
        own = carray(floats_at(keys), (n_keys,)), carray(floats_at(values), (n_values,))
        write_row(k, v, slot, own[0], own[1], scales, value_scales, size)
    elif job[_POOL_FORMAT] == 2:
        halves = carray(halves_at(keys), (n_keys,)), carray(halves_at(values), (n_values,))
        write_row(k, v, slot, halves[0], halves[1], scales, value_scales, size)
    else:
        codes = carray(codes_at(keys), (n_keys,)), carray(codes_at(values), (n_values,))
        write_row(k, v, slot, codes[0], codes[1], scales, value_scales, size)


@_compiled
def attend_chunk(job, layer, chunk, n):
    rows, n_heads, n_kv, dim = job[_N], job[_N_HEADS], job[_N_KV], job[_DIM]
    n_tiles = job[_N_TILES]
    q = carray(floats_at(job[_Q]), (rows * n_heads * dim,))
    z = carray(floats_at(job[_Z]), (rows, n_heads * dim))
    tables = carray(ints_at(job[_TABLES]), (job[_SPANS], job[_TABLE_WIDTH]))
    tiles = carray(ints_at(job[_TILES]), (n_tiles, 4))
    constants = carray(floats_at(job[_CONSTANTS]), (2,))
    places, off, place = 0, 0, 0
    if job[_PEAK_AT]:
        place = carray(ints_at(job[_PEAK_OF_LAYER]), (layer + 1,))[layer]
        if place >= 0:
            places = job[_PEAK_PLACES]
            off = places if job[_OFF_SINK] else 0
    peak_at = carray(places_at(job[_PEAK_AT]), (places, rows, n_heads))
    peak = carray(floats_at(job[_PEAK]), (places, rows, n_heads))
    off_sink = carray(floats_at(job[_OFF_SINK]), (off, rows, n_heads))
    pools = carray(ints_at(job[_POOLS]), (layer + 1, 4))
    keys, values, scales_at, value_scales_at = pools[layer, 0], pools[layer, 1], pools[layer, 2], pools[layer, 3]
    tokens = job[_POOL_TOKENS] * n_kv
    n_keys, n_values = tokens * dim, tokens * _width(job)
    coded = tokens if job[_POOL_FORMAT] == 1 else 0
    scales, value_scales = carray(floats_at(scales_at), (coded,)), carray(floats_at(value_scales_at), (coded,))
    parts = carray(ints_at(job[_PARTS]), (job[_N_PARTS], 8))
    counters = carray(ints_at(job[_COUNTERS]), (job[_N_COUNTERS],))
    records = carray(floats_at(job[_RECORDS]), (job[_N_RECORDS],))
    size, window, scale, cap = job[_SIZE], layer_fields(job, layer)[_WINDOW], constants[0], constants[1]
    place = max(0, place)
    first, last = chunk * job[_N_PARTS] // n, (chunk + 1) * job[_N_PARTS] // n
    if job[_POOL_FORMAT] == 4:
        own = carray(floats_at(keys), (n_keys,)), carray(floats_at(values), (n_values,))
        attend(
            q, own[0], own[1], scales, value_scales, size, n_kv, dim, tables, tiles, parts, counters, records, scale,
            window, cap, z, peak_at, peak, off_sink, place, first, last,
        )  # fmt: skip
    elif job[_POOL_FORMAT] == 2:
        halves = carray(halves_at(keys), (n_keys,)), carray(halves_at(values), (n_values,))
        attend(
            q, halves[0], halves[1], scales, value_scales, size, n_kv, dim, tables, tiles, parts, counters, records,
            scale, window, cap, z, peak_at, peak, off_sink, place, first, last,
        )  # fmt: skip
    else:
        codes = carray(codes_at(keys), (n_keys,)), carray(codes_at(values), (n_values,))
        attend(
            q, codes[0], codes[1], scales, value_scales, size, n_kv, dim, tables, tiles, parts, counters, records,
            scale, window, cap, z, peak_at, peak, off_sink, place, first, last,
        )  # fmt: skip
