"""These are the inner loops of what a decoder does to a row besides products with weights, on LLVM vectors of 16 lanes.

Each sum is chains of fused multiply-adds in the order of the inputs and a fixed order of the chains, and nothing here
allows LLVM to reorder or to contract: the bits of a row follow from the order that is written down, and are the same on
any number of threads and on any processor.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.vector import FLOATS, LANES, ZEROS, data_of, load, row_pointers, splat, store

# These are the lanes of a pair that are added, for each step from 16 vectors to one that has their sums: within
# quarters of a vector, then between them, each of which is one instruction.
_QUARTERS = range(0, LANES, 4)
_HALVES = [
    tuple([q + k + half for q in _QUARTERS for k in lanes] for half in (0, 2))
    for lanes in ((0, 16, 1, 17), (0, 1, 16, 17))
] + [
    ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]),
    ([k for k in range(32) if k % 8 < 4], [k for k in range(32) if k % 8 >= 4]),
]

_I64 = ir.IntType(64)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Returns x y + z, rounded once: LLVM's own operation, which it must not split."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])


@intrinsic
def dot(_context, x, x_at, y, y_at, n):  # type: ignore[no-untyped-def]
    """Returns Σ_k x[x_at + k] y[y_at + k] over k < n, float32: 16 chains, their sum by halves, then the rest."""
    signature = types.float32(x, types.int64, y, types.int64, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        left = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        right = b.gep(data_of(context, b, signature, args, 2), [args[3]])
        total = cgutils.alloca_once_value(b, ZEROS)
        whole = b.mul(b.udiv(args[4], _I64(LANES)), _I64(LANES))
        with cgutils.for_range_slice(b, _I64(0), whole, _I64(LANES), _I64) as (k, _):
            a, c = (load(b, b.gep(array, [k]), FLOATS) for array in (left, right))
            b.store(fma(b, a, c, b.load(total)), total)
        result = cgutils.alloca_once_value(b, _join_lanes(b, b.load(total), lambda b, x, y: b.fadd(x, y)))
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        scalar_fma = cgutils.get_or_insert_function(b.module, kind, "llvm.fma.f32")
        with cgutils.for_range_slice(b, whole, args[4], _I64(1), _I64) as (k, _):
            pair = [b.load(b.gep(array, [k])) for array in (left, right)]
            b.store(b.call(scalar_fma, [*pair, b.load(result)]), result)
        return b.load(result)

    return signature, generate


@intrinsic
def sum_of(_context, x, x_at, n):  # type: ignore[no-untyped-def]
    """Returns Σ_k x[x_at + k] over k < n, a multiple of 16, float32: the sum of each lane, and these by halves."""
    return _of_all(x, 0.0, lambda b, value, total: b.fadd(value, total))


@intrinsic
def largest_of(_context, x, x_at, n):  # type: ignore[no-untyped-def]
    """Returns max_k x[x_at + k] over k < n, a multiple of 16, float32, without NaN; -inf where all are NaN."""
    return _of_all(x, float("-inf"), lambda b, value, most: b.select(b.fcmp_ordered(">", value, most), value, most))


def _of_all(x: Any, start: float, join: Any) -> Any:
    """Returns the signature and code of a reduction that joins lane by lane, and then by halves."""
    signature = types.float32(x, types.int64, types.int64)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        array = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        joined = cgutils.alloca_once_value(b, ir.Constant(FLOATS, [start] * LANES))
        with cgutils.for_range_slice(b, _I64(0), args[2], _I64(LANES), _I64) as (k, _):
            b.store(join(b, load(b, b.gep(array, [k]), FLOATS), b.load(joined)), joined)
        return _join_lanes(b, b.load(joined), join)

    return signature, generate


@intrinsic
def dot_keys(_context, q, q_at, keys, keys_at, stride, width, scores, scores_at):  # type: ignore[no-untyped-def]
    """Sets scores[scores_at + j] = q · key_j for 16 keys, of which key j begins at keys[keys_at + j stride].

    `width` is a multiple of 16. Each score is 16 chains and their sum by neighbours, pairs of neighbours and so on.
    """
    signature = types.void(q, types.int64, keys, types.int64, types.int64, types.int64, scores, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        query = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        first = b.gep(data_of(context, b, signature, args, 2), [args[3]])
        parts = []
        # It takes eight keys at a time, because there are registers for the addresses of eight.
        for start in range(0, LANES, 8):
            rows = [b.gep(first, [b.mul(args[4], _I64(j))]) for j in range(start, start + 8)]
            sums = [cgutils.alloca_once_value(b, ZEROS) for _ in rows]
            with cgutils.for_range_slice(b, _I64(0), args[5], _I64(LANES), _I64) as (k, _):
                value = load(b, b.gep(query, [k]), FLOATS)
                for row, total in zip(rows, sums, strict=True):
                    b.store(fma(b, load(b, b.gep(row, [k]), FLOATS), value, b.load(total)), total)
            parts.append(_sum_of_each(b, [b.load(total) for total in sums]))
        out = b.gep(data_of(context, b, signature, args, 6), [args[7]])
        low, high = (_index(places) for places in _HALVES[-1])
        store(b, b.fadd(b.shuffle_vector(*parts, low), b.shuffle_vector(*parts, high)), out)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_values(_context, weights, weights_at, n, values, values_at, stride, width, z, z_at):  # type: ignore[no-untyped-def]
    """Adds Σ_j weights[weights_at[r] + j] values[values_at + j stride + k] over j < n to z[z_at[r] + k].

    `weights_at` and `z_at` are tuples; `width` is a multiple of 16. Terms are added in the order of j.
    """
    signature = types.void(weights, weights_at, types.int64, values, types.int64, types.int64, types.int64, z, z_at)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        factors = row_pointers(context, b, signature, args, 0, 1)
        first = b.gep(data_of(context, b, signature, args, 3), [args[4]])
        outs = row_pointers(context, b, signature, args, 7, 8)
        # Vectors run side by side, so that no sum waits for the one before: four of them, then the rest one by one.
        whole = b.mul(b.udiv(args[6], _I64(4 * LANES)), _I64(4 * LANES))
        for begin, end, vectors in ((_I64(0), whole, 4), (whole, args[6], 1)):
            sums = [[cgutils.alloca_once(b, FLOATS) for _ in range(vectors)] for _ in outs]
            with cgutils.for_range_slice(b, begin, end, _I64(vectors * LANES), _I64) as (k, _):
                places = [b.add(k, _I64(i * LANES)) for i in range(vectors)]
                for out, row in zip(outs, sums, strict=True):
                    for place, total in zip(places, row, strict=True):
                        b.store(load(b, b.gep(out, [place]), FLOATS), total)
                with cgutils.for_range(b, args[2]) as loop:
                    here = b.gep(first, [b.mul(loop.index, args[5])])
                    lanes = [load(b, b.gep(here, [place]), FLOATS) for place in places]
                    for factor, row in zip(factors, sums, strict=True):
                        weight = splat(b, b.load(b.gep(factor, [loop.index])))
                        for value, total in zip(lanes, row, strict=True):
                            b.store(fma(b, weight, value, b.load(total)), total)
                for out, row in zip(outs, sums, strict=True):
                    for place, total in zip(places, row, strict=True):
                        store(b, b.load(total), b.gep(out, [place]))
        return context.get_dummy_value()

    return signature, generate


def _join_lanes(b: Any, vector: Any, join: Any) -> Any:
    n = LANES
    while n > 1:
        n //= 2
        low, high = (b.shuffle_vector(vector, vector, _index(range(start, start + n))) for start in (0, n))
        vector = join(b, low, high)
    return b.extract_element(vector, ir.IntType(32)(0))


def _sum_of_each(b: Any, vectors: list[Any]) -> Any:
    """Returns the sum of the lanes of vector j in lane j, for 16 vectors; for eight, two partial sums of each."""
    for low, high in _HALVES:
        if len(vectors) == 1:
            break
        vectors = [
            b.fadd(b.shuffle_vector(x, y, _index(low)), b.shuffle_vector(x, y, _index(high)))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _index(places: Any) -> Any:
    places = list(places)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
