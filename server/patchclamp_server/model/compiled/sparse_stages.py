"""The stages of a layer with sparse rows (sparse_rows.py): rows lie in runs of such and of dense ones."""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, attr-defined"

import numba
from numba import carray, types

from patchclamp_server.cpu.atomics import bytes_at, floats_at, ints_at, places_at
from patchclamp_server.cpu.integers.products import record_bytes
from patchclamp_server.cpu.products import FIELDS, PANEL, multiply_rows
from patchclamp_server.cpu.sparse.glanced import TILE, multiply_glanced
from patchclamp_server.cpu.sparse.kept import SUMS, UNIT, add_kept, join_sums, keep_largest
from patchclamp_server.cpu.vector import LANES
from patchclamp_server.model.compiled.job import LAYER_FIELDS, Job, Layer, Matrix, SparseLayer, Stage

_N, _D, _FF, _LAYERS, _H, _HIDDEN, _NEURONS, _MLP_OUT, _ROUNDED = (
    int(field)
    for field in (
        Job.ROWS, Job.D_MODEL, Job.D_FF, Job.LAYERS, Job.H, Job.HIDDEN, Job.NEURONS, Job.MLP_OUT, Job.ROUNDED
    )
)  # fmt: skip
_SPARSE, _KEEP, _FORCED, _COUNTS, _SCORES, _PARTIALS = (
    int(field) for field in (Job.SPARSE, Job.KEEP, Job.FORCED, Job.KEPT_COUNTS, Job.SCORES, Job.PARTIALS)
)
_INPUT, _CHOOSE, _OUTPUT, _KEPT, _KEPT_SUM = (
    int(stage)
    for stage in (Stage.SPARSE_INPUT, Stage.CHOOSE, Stage.SPARSE_OUTPUT, Stage.KEPT, Stage.KEPT_SUM)
)  # fmt: skip
_PARTS, _N_PARTS, _OUT, _DEPTH, _BIAS, _ROUNDS = (int(field) for field in Matrix)
(
    _INPUT_PARTS, _N_INPUT_PARTS, _OUTPUT_PARTS, _N_OUTPUT_PARTS, _TILES, _TILE_BYTES, _TILE_HALVES, _TILE_GROUPS,
    _NORMS, _CODES, _RECORD, _SCALES, _HALVES, _GROUP, _GROUPS, _UNITS,
) = (int(field) for field in SparseLayer)  # fmt: skip
_MATRICES, _LAYER_FIELDS, _SPARSE_FIELDS, _MATRIX_FIELDS = (
    int(Layer.MATRICES),
    LAYER_FIELDS,
    len(SparseLayer),
    len(Matrix),
)
_FIELDS, _SUMS = len(Job), SUMS
# Chunks of a product begin where panels, tiles and records of outputs do.
_ALIGNED = 2 * PANEL
assert _ALIGNED % TILE == 0

_compiled = numba.njit(nogil=True, cache=True)
_record_bytes = numba.njit(nogil=True, cache=True)(record_bytes)


@_compiled
def _run(job, stage, layer, flags, chunk, n):
    rows = job[_N]
    keep = carray(ints_at(job[_KEEP] + layer * rows * 8), (rows,))
    own = carray(ints_at(job[_SPARSE] + layer * _SPARSE_FIELDS * 8), (_SPARSE_FIELDS,))
    if stage in (_INPUT, _OUTPUT):
        _multiply(job, stage, layer, flags, chunk, n, keep, own)
    elif keep[chunk // _SUMS if stage == _KEPT else chunk] < 0:
        return
    elif stage == _CHOOSE:
        _choose(job, layer, chunk, keep[chunk], own)
    elif stage == _KEPT:
        row, part = chunk // _SUMS, chunk % _SUMS
        width, groups = own[_UNITS] * UNIT, own[_GROUPS]
        y = job[_PARTIALS] + chunk * width * 4
        sums = carray(floats_at(y), (width,))
        for o in range(width):
            sums[o] = 0
        neurons = job[_NEURONS] + row * job[_FF] * 4
        add_kept(
            neurons, part * groups // _SUMS, (part + 1) * groups // _SUMS, own[_GROUP], own[_CODES], own[_RECORD],
            own[_SCALES], own[_HALVES] != 0, own[_UNITS], y,
        )  # fmt: skip
    else:
        _join(job, layer, chunk, own[_UNITS] * UNIT)


@_compiled
def _matrix(job, layer, which):
    at = layer * _LAYER_FIELDS + _MATRICES + which * _MATRIX_FIELDS
    return carray(ints_at(job[_LAYERS] + at * 8), (_MATRIX_FIELDS,))


@_compiled
def _multiply(job, stage, layer, flags, chunk, chunks, keep, own):
    is_input = stage == _INPUT
    matrix = _matrix(job, layer, 2 if is_input else 3)
    out, depth = matrix[_OUT], matrix[_DEPTH]
    source, target = (job[_H], job[_HIDDEN]) if is_input else (job[_NEURONS], job[_MLP_OUT])
    parts = carray(ints_at(matrix[_PARTS]), (matrix[_N_PARTS], FIELDS))
    at = _INPUT_PARTS if is_input else _OUTPUT_PARTS
    rounded_parts = carray(ints_at(own[at]), (own[at + 1], FIELDS))
    pieces = (out + _ALIGNED - 1) // _ALIGNED
    start, end = chunk * pieces // chunks * _ALIGNED, min(out, (chunk + 1) * pieces // chunks * _ALIGNED)
    record = _record_bytes(depth)
    rows = keep.shape[0]
    t = 0
    while t < rows:
        last = t + 1
        while last < rows and (keep[last] >= 0) == (keep[t] >= 0):
            last += 1
        x, y, rounded, n = source + t * depth * 4, target + t * out * 4, job[_ROUNDED] + t * record, last - t
        if keep[t] < 0:
            multiply_rows(parts, depth, x, rounded if matrix[_ROUNDS] else 0, n, y, out, start, end)
        elif is_input and own[_TILES]:
            multiply_glanced(
                own[_TILES], own[_TILE_BYTES], own[_TILE_HALVES] != 0, own[_TILE_GROUPS], start // TILE, end // TILE,
                rounded, n, y, out,
            )  # fmt: skip
        elif flags != 1:
            multiply_rows(rounded_parts, depth, x, rounded, n, y, out, start, end)
        t = last
    if matrix[_BIAS]:
        bias = carray(floats_at(matrix[_BIAS]), (out,))
        values = carray(floats_at(target), (rows * out,))
        for i in range(rows):
            if flags != 1 or keep[i] < 0:
                for o in range(start, end):
                    values[i * out + o] += bias[o]


@_compiled
def _choose(job, layer, row, k, own):
    rows, width = job[_N], job[_FF]
    h = carray(floats_at(job[_NEURONS] + row * width * 4), (width,))
    norms = carray(floats_at(own[_NORMS]), (width,))
    filled = (width + LANES - 1) // LANES * LANES
    bits = carray(places_at(job[_SCORES] + row * filled * 4), (filled,))
    address = 0
    if job[_FORCED]:
        address = carray(ints_at(job[_FORCED] + layer * rows * 8), (rows,))[row]
    forced = carray(bytes_at(address), (width if address else 0,))
    carray(ints_at(job[_COUNTS] + layer * rows * 8), (rows,))[row] = keep_largest(h, norms, k, forced, bits)


@_compiled
def _join(job, layer, row, width):
    """Sums the parts of a row, and adds the biases."""
    d = job[_D]
    y = carray(floats_at(job[_MLP_OUT] + row * d * 4), (d,))
    parts = carray(floats_at(job[_PARTIALS] + row * _SUMS * width * 4), (_SUMS, width))
    join_sums(parts, y)
    address = _matrix(job, layer, 3)[_BIAS]
    if address:
        bias = carray(floats_at(address), (d,))
        for o in range(d):
            y[o] += bias[o]


@numba.cfunc(types.void(*[types.int64] * 6), cache=True)
def run_sparse(address, stage, layer, flags, chunk, n):
    """Does a chunk of a stage of the job at `address`."""
    _run(carray(ints_at(address), (_FIELDS,)), stage, layer, flags, chunk, n)
