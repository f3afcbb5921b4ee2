"""The blocks of a decoder as compiled code: stages whose chunks are shared among threads.

    x ← x + attn(norm(x));  x ← x + mlp(norm(x))

Each stage is the same loop over rows, outputs or heads that a step in Python calls (cpu/invariant, row_attention.py),
so its bits are the same. A thread takes the next chunk of the stage until there is none, and goes on to the next stage
once all are done: whoever comes late, or never, is not waited for.

numba caches this on disk by this file alone: a change in what it calls needs a change here.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, attr-defined"

import numba
from numba import carray, types

from patchclamp_server.cpu.atomics import (
    add_to,
    bytes_at,
    call_with_three,
    codes_at,
    floats_at,
    ints_at,
    relax,
    value_at,
)
from patchclamp_server.cpu.invariant.products import multiply_codes, multiply_floats, pack_tile
from patchclamp_server.cpu.invariant.rows import activations, layer_norms, rms_norms
from patchclamp_server.cpu.quantized import GROUP, LANES
from patchclamp_server.model.compiled.heads import attend_chunk, attention_chunks, finish_rows
from patchclamp_server.model.compiled.heads import layer_fields as _layer
from patchclamp_server.model.compiled.job import LAYER_FIELDS, Format, Job, Layer, Matrix, Stage

# A chunk of a stage of rows has so many, and that of a product at least so many weights, for each two rows once more.
_ROWS = 8
_COST = 1 << 16
# Chunks of a stage for each thread, so that one that is held up by others on its processor does not hold up the stage.
_CHUNKS = 4

_LAYER_FIELDS, _MATRIX_FIELDS = LAYER_FIELDS, len(Matrix)
(
    _ATTN_NORM, _QKV, _HEADS, _ATTEND, _PACK_Z, _ATTN_OUTPUT, _POST_ATTN_NORM,
    _MLP_NORM, _MLP_INPUT, _ACTIVATION, _PACK_NEURONS, _MLP_OUTPUT, _POST_MLP_NORM, _ADD, _LOOK,
) = (int(stage) for stage in Stage)  # fmt: skip
(
    _FIRST, _LAST, _STAGES, _COUNTERS, _THREADS, _N, _TILES, _STARTS, _LAYERS, _EPSILONS, _X, _H, _PACKED, _SUMS,
    _QKV_AT, _Q, _Z, _ATTN_OUT, _HIDDEN, _NEURONS, _MLP_OUT, _D, _FF, _GATED, _KIND, _N_HEADS, _N_KV, _DIM,
    _CONSTANTS, _ROTARY, _CONTEXT, _POSITIONS, _SLOTS, _POOLS, _POOL_FORMAT, _POOL_TOKENS, _SIZE, _TABLES,
    _SPANS, _TABLE_WIDTH, _ATTENTION_TILES, _N_ATTENTION_TILES, _PARTS, _N_PARTS, _PART_COUNTERS, _N_PART_COUNTERS,
    _RECORDS, _N_RECORDS, _PEAK_AT, _PEAK, _OFF_SINK, _PEAK_PLACES, _PEAK_OF_LAYER,
    _LOOK_AT, _LOOK_STATE, _FAILED,
) = (int(field) for field in Job)  # fmt: skip
_FLOATS, _CODES_4, _CODES_8 = (int(kind) for kind in Format)
_FORMAT, _WEIGHTS, _SCALES, _BLOCKS, _DEPTH, _BIAS = (int(field) for field in Matrix)
_MATRICES = int(Layer.MATRICES)

_FIELDS = len(Job)

_compiled = numba.njit(nogil=True, cache=True)


@_compiled
def _run_stages(job):
    """Works on the stages of a job until all are done."""
    counters = carray(ints_at(job[_COUNTERS]), (job[_LAST] * 8,))
    stages = carray(ints_at(job[_STAGES]), (job[_LAST], 3))
    for s in range(job[_FIRST], job[_LAST]):
        stage, layer, flags = stages[s, 0], stages[s, 1], stages[s, 2]
        n = _chunks(job, stage, layer)
        while True:
            chunk = add_to(counters, s * 8, 1)
            if chunk >= n:
                break
            # Others wait for this chunk, whatever becomes of it.
            try:
                _run_chunk(job, stage, layer, flags, chunk, n)
            except Exception:
                job[_FAILED] = 1
            add_to(counters, s * 8 + 4, 1)
        waited = 0
        while value_at(counters, s * 8 + 4) < n:
            relax(waited)
            waited += 1


@_compiled
def _chunks(job, stage, layer):
    if stage in (_QKV, _ATTN_OUTPUT, _MLP_INPUT, _MLP_OUTPUT):
        matrix = _matrix(job, layer, stage)
        cost = matrix[_BLOCKS] * LANES * matrix[_DEPTH] * (job[_N] + 1) // 2
        return max(1, min(job[_THREADS] * _CHUNKS, matrix[_BLOCKS], cost // _COST))
    if stage == _ATTEND:
        return attention_chunks(job)
    if stage in (_HEADS, _POST_ATTN_NORM, _POST_MLP_NORM, _ADD):
        return (job[_N] + _ROWS - 1) // _ROWS
    return 1 if stage == _LOOK else job[_TILES]


@_compiled
def _run_chunk(job, stage, layer, flags, chunk, n):
    d, rows = job[_D], job[_N]
    start, end = chunk * _ROWS, min(rows, (chunk + 1) * _ROWS)
    if stage == _ATTN_NORM:
        _norm_tile(job, layer, 0, flags, chunk, _QKV)
    elif stage == _QKV:
        _multiply(job, layer, stage, job[_H], job[_QKV_AT], chunk, n)
    elif stage == _HEADS:
        finish_rows(job, layer, start, end)
    elif stage == _ATTEND:
        attend_chunk(job, layer, chunk, n)
    elif stage == _PACK_Z:
        _pack(job, job[_Z], job[_N_HEADS] * job[_DIM], layer, _ATTN_OUTPUT, chunk)
    elif stage == _ATTN_OUTPUT:
        _multiply(job, layer, stage, job[_Z], job[_ATTN_OUT], chunk, n)
    elif stage == _POST_ATTN_NORM:
        _norm(job, layer, 1, job[_ATTN_OUT], job[_ATTN_OUT], start, end)
    elif stage == _MLP_NORM:
        _norm_tile(job, layer, 2, flags, chunk, _MLP_INPUT)
    elif stage == _MLP_INPUT:
        _multiply(job, layer, stage, job[_H], job[_HIDDEN], chunk, n)
    elif stage == _ACTIVATION:
        hidden = carray(floats_at(job[_HIDDEN]), (rows, job[_FF] * (1 + job[_GATED])))
        neurons = carray(floats_at(job[_NEURONS]), (rows, job[_FF]))
        first, last = _tile(job, chunk)
        activations(hidden, job[_KIND], job[_GATED] != 0, neurons, first, last)
        if flags:
            _pack(job, job[_NEURONS], job[_FF], layer, _MLP_OUTPUT, chunk)
    elif stage == _PACK_NEURONS:
        _pack(job, job[_NEURONS], job[_FF], layer, _MLP_OUTPUT, chunk)
    elif stage == _MLP_OUTPUT:
        _multiply(job, layer, stage, job[_NEURONS], job[_MLP_OUT], chunk, n)
    elif stage == _POST_MLP_NORM:
        _norm(job, layer, 3, job[_MLP_OUT], job[_MLP_OUT], start, end)
    elif stage == _ADD:
        _add(job, d, flags, start, end)
    elif stage == _LOOK:
        call_with_three(job[_LOOK_AT], job[layer], flags, job[_LOOK_STATE])


@_compiled
def _tile(job, tile):
    """Returns the first row of a tile and the one after its last; rows that repeat the last one are none."""
    starts = carray(ints_at(job[_STARTS]), (job[_TILES] + 1,))
    return starts[tile], min(job[_N], starts[tile + 1])


@_compiled
def _matrix(job, layer, stage):
    which = 0 if stage == _QKV else 1 if stage == _ATTN_OUTPUT else 2 if stage == _MLP_INPUT else 3
    at = layer * _LAYER_FIELDS + _MATRICES + which * _MATRIX_FIELDS
    return carray(ints_at(job[_LAYERS] + at * 8), (_MATRIX_FIELDS,))


@_compiled
def _add(job, d, flags, start, end):
    x = carray(floats_at(job[_X]), (job[_N], d))
    # In this order, as a block adds them one after the other.
    if flags & 1:
        attn_out = carray(floats_at(job[_ATTN_OUT]), (job[_N], d))
        for i in range(start, end):
            for k in range(d):
                x[i, k] += attn_out[i, k]
    if flags & 2:
        mlp_out = carray(floats_at(job[_MLP_OUT]), (job[_N], d))
        for i in range(start, end):
            for k in range(d):
                x[i, k] += mlp_out[i, k]


@_compiled
def _norm(job, layer, which, source, target, start, end):
    d = job[_D]
    fields = _layer(job, layer)
    eps = carray(floats_at(job[_EPSILONS] + layer * 20), (5,))[which]
    x, out = carray(floats_at(source), (job[_N], d)), carray(floats_at(target), (job[_N], d))
    weight = carray(floats_at(fields[2 * which]), (d,))
    if fields[2 * which + 1] == 0:
        rms_norms(x, weight, eps, out, start, end)
    else:
        layer_norms(x, weight, carray(floats_at(fields[2 * which + 1]), (d,)), eps, out, start, end)


@_compiled
def _norm_tile(job, layer, which, flags, tile, product):
    start, end = _tile(job, tile)
    _add(job, job[_D], flags, start, end)
    _norm(job, layer, which, job[_X], job[_H], start, end)
    _pack(job, job[_H], job[_D], layer, product, tile)


@_compiled
def _pack(job, source, depth, layer, product, tile):
    """Packs a tile of rows [T, depth] for a product that follows, with the sums of their groups for 4-bit codes."""
    tiles = job[_TILES]
    starts = carray(ints_at(job[_STARTS]), (tiles + 1,))
    end = starts[tiles]
    coded = _matrix(job, layer, product)[_FORMAT] == _CODES_4
    if end == 1 and not coded:
        return
    x = carray(floats_at(source), (job[_N], depth))
    sums = carray(floats_at(job[_SUMS]), (end * (depth // GROUP) if coded else 0,))
    pack_tile(x, starts, tile, carray(floats_at(job[_PACKED]), (end * depth,)), sums)


@_compiled
def _multiply(job, layer, stage, source, target, chunk, chunks):
    matrix = _matrix(job, layer, stage)
    n, blocks, depth = job[_N], matrix[_BLOCKS], matrix[_DEPTH]
    start, end = chunk * blocks // chunks, (chunk + 1) * blocks // chunks
    tiles = job[_TILES]
    starts = carray(ints_at(job[_STARTS]), (tiles + 1,))
    rows = starts[tiles]
    # A single row needs no packing.
    x = carray(floats_at(source if rows == 1 else job[_PACKED]), (rows * depth,))
    width = blocks * LANES
    y = carray(floats_at(target), (n * width,))
    kind, weights = matrix[_FORMAT], matrix[_WEIGHTS]
    if kind == _FLOATS:
        floats = carray(floats_at(weights), (width * depth,))
        multiply_floats(floats, depth, x, starts, n, y, start, end)
    else:
        groups = depth // GROUP
        sums = carray(floats_at(job[_SUMS]), (rows * groups,))
        scales = carray(floats_at(matrix[_SCALES]), (2 * width * groups,))
        if kind == _CODES_4:
            packed = carray(bytes_at(weights), (width * depth // 2,))
            multiply_codes(packed, scales, groups, GROUP // 2 * LANES, x, sums, starts, n, y, start, end)
        else:
            codes = carray(codes_at(weights), (width * depth,))
            multiply_codes(codes, scales, groups, GROUP * LANES, x, sums, starts, n, y, start, end)
    if matrix[_BIAS]:
        bias = carray(floats_at(matrix[_BIAS]), (width,))
        for i in range(n):
            for o in range(start * LANES, end * LANES):
                y[i * width + o] += bias[o]


@numba.cfunc(types.void(types.int64), cache=True)
def run_stages(address):
    """Works on the stages of the job at `address` until all are done. Callers do so by its own address, and so do not
    compile it once more."""
    _run_stages(carray(ints_at(address), (_FIELDS,)))
