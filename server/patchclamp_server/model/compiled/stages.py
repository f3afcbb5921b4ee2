"""The blocks of a decoder as compiled code: stages whose chunks are shared among threads.

    x ← x + attn(norm(x));  x ← x + mlp(norm(x))

Each stage is the same loop over rows, outputs or heads that a step in Python calls (cpu/invariant, row_attention.py),
so its bits are the same. A thread takes the next chunk of the stage until there is none, and goes on to the next stage
once all are done: whoever comes late, or never, is not waited for.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, attr-defined"

import numba
from numba import carray, types

from patchclamp_server.cpu.atomics import (
    add_to,
    call_with,
    cycles,
    floats_at,
    ints_at,
    relax,
    value_at,
)
from patchclamp_server.cpu.integers.products import round_rows
from patchclamp_server.cpu.integers.tiles import ROWS
from patchclamp_server.cpu.invariant.rows import activations, layer_norms, rms_norms
from patchclamp_server.cpu.products import FIELDS, PANEL, multiply_rows
from patchclamp_server.cpu.sparse.kept import SUMS
from patchclamp_server.model.compiled.heads import attend_chunk, attention_chunks, finish_rows
from patchclamp_server.model.compiled.heads import layer_fields as _layer
from patchclamp_server.model.compiled.job import LAYER_FIELDS, Job, Layer, Matrix, Stage

# A chunk of a stage of rows has so many, and that of a product at least so many weights, for each two rows once more.
_ROWS = 8
_COST = 1 << 16
# Chunks of a stage for each thread, so that one that is held up by others on its processor does not hold up the stage.
_CHUNKS = 4

_LAYER_FIELDS, _MATRIX_FIELDS = LAYER_FIELDS, len(Matrix)
(
    _ATTN_NORM, _QKV, _HEADS, _ATTEND, _ATTN_OUTPUT, _POST_ATTN_NORM,
    _MLP_NORM, _MLP_INPUT, _ACTIVATION, _MLP_OUTPUT, _POST_MLP_NORM, _ADD, _CALL, _ROUND,
    _SPARSE_INPUT, _CHOOSE, _SPARSE_OUTPUT, _KEPT, _KEPT_SUM,
) = (int(stage) for stage in Stage)  # fmt: skip
(
    _FIRST, _LAST, _STAGES, _COUNTERS, _THREADS, _N, _LAYERS, _EPSILONS, _X, _H, _QKV_AT, _Z, _ATTN_OUT, _HIDDEN,
    _NEURONS, _MLP_OUT, _ROUNDED, _D, _FF, _GATED, _KIND, _CALLS, _RUN_SPARSE, _FAILED,
) = (
    int(field)
    for field in (
        Job.FIRST, Job.LAST, Job.STAGES, Job.COUNTERS, Job.THREADS, Job.ROWS, Job.LAYERS, Job.EPSILONS, Job.X, Job.H,
        Job.QKV, Job.Z, Job.ATTN_OUT, Job.HIDDEN, Job.NEURONS, Job.MLP_OUT, Job.ROUNDED, Job.D_MODEL, Job.D_FF,
        Job.GATED, Job.ACTIVATION, Job.CALLS, Job.RUN_SPARSE, Job.FAILED,
    )
)  # fmt: skip
_PARTS, _N_PARTS, _OUT, _DEPTH, _BIAS, _ROUNDS = (int(field) for field in Matrix)
_MATRICES = int(Layer.MATRICES)

_FIELDS, _SUMS = len(Job), SUMS

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
            if chunk == 0:
                counters[s * 8 + 6] = cycles()
            # Others wait for this chunk, whatever becomes of it.
            try:
                _run_chunk(job, stage, layer, flags, chunk, n)
            except Exception:
                job[_FAILED] = 1
            if add_to(counters, s * 8 + 4, 1) == n - 1:
                counters[s * 8 + 7] = cycles()
        waited = 0
        while value_at(counters, s * 8 + 4) < n:
            relax(waited)
            waited += 1


@_compiled
def _chunks(job, stage, layer):
    if stage in (_QKV, _ATTN_OUTPUT, _MLP_INPUT, _MLP_OUTPUT, _SPARSE_INPUT, _SPARSE_OUTPUT):
        matrix = _matrix(job, layer, stage)
        cost = matrix[_OUT] * matrix[_DEPTH] * (job[_N] + 1) // 2
        return max(1, min(job[_THREADS] * _CHUNKS, matrix[_OUT] // PANEL, cost // _COST))
    if stage == _ATTEND:
        return attention_chunks(job)
    if stage in (_CHOOSE, _KEPT_SUM):
        return job[_N]
    if stage == _KEPT:
        return job[_N] * _SUMS
    return 1 if stage == _CALL else (job[_N] + _ROWS - 1) // _ROWS


@_compiled
def _run_chunk(job, stage, layer, flags, chunk, n):
    d, rows = job[_D], job[_N]
    start, end = chunk * _ROWS, min(rows, (chunk + 1) * _ROWS)
    if stage == _ATTN_NORM:
        _add(job, d, flags, start, end)
        _norm(job, layer, 0, job[_X], job[_H], start, end)
        if flags & 4:
            round_rows(job[_H], d, job[_ROUNDED], start, end)
    elif stage == _QKV:
        _multiply(job, layer, stage, job[_H], job[_QKV_AT], chunk, n)
    elif stage == _HEADS:
        finish_rows(job, layer, start, end)
    elif stage == _ATTEND:
        attend_chunk(job, layer, chunk, n)
    elif stage == _ATTN_OUTPUT:
        _multiply(job, layer, stage, job[_Z], job[_ATTN_OUT], chunk, n)
    elif stage == _POST_ATTN_NORM:
        _norm(job, layer, 1, job[_ATTN_OUT], job[_ATTN_OUT], start, end)
    elif stage == _MLP_NORM:
        _add(job, d, flags, start, end)
        _norm(job, layer, 2, job[_X], job[_H], start, end)
        if flags & 4:
            round_rows(job[_H], d, job[_ROUNDED], start, end)
    elif stage == _MLP_INPUT:
        _multiply(job, layer, stage, job[_H], job[_HIDDEN], chunk, n)
    elif stage == _ACTIVATION:
        hidden = carray(floats_at(job[_HIDDEN]), (rows, job[_FF] * (1 + job[_GATED])))
        neurons = carray(floats_at(job[_NEURONS]), (rows, job[_FF]))
        activations(hidden, job[_KIND], job[_GATED] != 0, neurons, start, end)
        if flags & 4:
            round_rows(job[_NEURONS], job[_FF], job[_ROUNDED], start, end)
    elif stage == _MLP_OUTPUT:
        _multiply(job, layer, stage, job[_NEURONS], job[_MLP_OUT], chunk, n)
    elif stage == _POST_MLP_NORM:
        _norm(job, layer, 3, job[_MLP_OUT], job[_MLP_OUT], start, end)
    elif stage == _ADD:
        _add(job, d, flags, start, end)
    elif stage == _CALL:
        own = carray(ints_at(job[_CALLS] + flags * 24), (3,))
        call_with(own[0], job[layer], own[1], own[2])
    elif stage == _ROUND:
        source = job[_Z] if flags == _ATTN_OUTPUT else job[_NEURONS] if flags == _MLP_OUTPUT else job[_H]
        round_rows(source, _matrix(job, layer, flags)[_DEPTH], job[_ROUNDED], start, end)
    else:
        call_with(job[_RUN_SPARSE], job.ctypes.data, stage, layer, flags, chunk, n)


@_compiled
def _matrix(job, layer, stage):
    inputs = stage in (_MLP_INPUT, _SPARSE_INPUT)
    which = 0 if stage == _QKV else 1 if stage == _ATTN_OUTPUT else 2 if inputs else 3
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
def _multiply(job, layer, stage, source, target, chunk, chunks):
    matrix = _matrix(job, layer, stage)
    n, out = job[_N], matrix[_OUT]
    rounds = matrix[_ROUNDS] != 0
    # Chunks begin where panels or tiles do.
    rows = ROWS if rounds else PANEL
    panels = (out + rows - 1) // rows
    start, end = chunk * panels // chunks * rows, min(out, (chunk + 1) * panels // chunks * rows)
    parts = carray(ints_at(matrix[_PARTS]), (matrix[_N_PARTS], FIELDS))
    rounded = job[_ROUNDED] if rounds else 0
    multiply_rows(parts, matrix[_DEPTH], source, rounded, n, target, out, start, end)
    if matrix[_BIAS]:
        bias = carray(floats_at(matrix[_BIAS]), (out,))
        y = carray(floats_at(target), (n * out,))
        for i in range(n):
            for o in range(start, end):
                y[i * out + o] += bias[o]


@numba.cfunc(types.void(types.int64), cache=True)
def run_stages(address):
    """Works on the stages of the job at `address` until all are done. Callers do so by its own address, and so do not
    compile it once more."""
    _run_stages(carray(ints_at(address), (_FIELDS,)))
