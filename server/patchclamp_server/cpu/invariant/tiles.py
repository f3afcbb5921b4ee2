"""These are the inner loops of products whose bits do not depend on the number of rows: LLVM vectors of 16 outputs.

A tile is R rows of x and a block of 16 outputs. Each of its sums is one chain of fused multiply-adds in the order of
the inputs, whatever R is, and nothing here allows LLVM to reorder or to contract: the bits of a row follow from the
order that is written down, and are the same on any number of threads and on any processor.

Weights are laid out block by block, [out / 16, in, 16 outputs], and the rows of a tile input by input, [in, R].
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.vector import (
    FLOATS,
    LANES,
    UNIT,
    ZEROS,
    data_of,
    load,
    load_lanes,
    row_pointers,
    splat,
    store,
)

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_BYTES = ir.VectorType(_I8, LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


@intrinsic
def multiply_tile(_context, weights, at, x, x_at, depth, y, y_at):  # type: ignore[no-untyped-def]
    """Sets y[y_at[r] + lane] = Σ_k weights[at + 16 k + lane] x[x_at + R k + r], over k < `depth`, in order of k.

    `y_at` is a tuple of R offsets. weights and x are float32.
    """
    signature = types.void(weights, types.int64, x, types.int64, types.int64, y, y_at)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        block = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        values = b.gep(data_of(context, b, signature, args, 2), [args[3]])
        outs = row_pointers(context, b, signature, args, 5, 6)
        sums = [cgutils.alloca_once_value(b, ZEROS) for _ in outs]
        with cgutils.for_range(b, args[4]) as loop:
            lanes = load(b, b.gep(block, [b.mul(loop.index, _I64(LANES))]), FLOATS)
            _accumulate(b, sums, lanes, values, b.mul(loop.index, _I64(len(outs))))
        for total, out in zip(sums, outs, strict=True):
            store(b, b.load(total), out)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def multiply_code_tile(  # type: ignore[no-untyped-def]
    _context, codes, at, scales, scales_at, x, x_at, sums, sums_at, groups, y, y_at
):
    """Sets y[y_at[r] + lane] = Σ_g scale_g (Σ_k code_gk x_gk) + low_g sums_g, with groups and codes in order.

    A group is 32 codes: signed bytes, or 16 bytes of which byte k holds code k in its low and code k + 16 in its high
    half, which are added in turn. `sums` [groups, R] are the sums of the rows' groups and are read for 4 bits only.
    """
    signature = types.void(
        codes, types.int64, scales, types.int64, x, types.int64, sums, types.int64, types.int64, y, y_at
    )

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        packed = signature.args[0].dtype == types.uint8
        block, scale_row, values, group_sums = (
            b.gep(data_of(context, b, signature, args, i), [args[i + 1]]) for i in (0, 2, 4, 6)
        )
        outs = row_pointers(context, b, signature, args, 9, 10)
        rows = len(outs)
        totals = [cgutils.alloca_once_value(b, ZEROS) for _ in outs]
        parts = [cgutils.alloca_once(b, FLOATS) for _ in outs]
        elements = UNIT // 2 if packed else UNIT
        with cgutils.for_range(b, args[8]) as group:
            for part in parts:
                b.store(ZEROS, part)
            first = b.gep(block, [b.mul(group.index, _I64(elements * LANES))])
            inputs = b.mul(group.index, _I64(UNIT * rows))
            with cgutils.for_range(b, _I64(elements)) as loop:
                here = b.gep(first, [b.mul(loop.index, _I64(LANES))])
                place = b.add(inputs, b.mul(loop.index, _I64(rows)))
                if packed:
                    low, high = _halves(b, here)
                    _accumulate(b, parts, low, values, place)
                    _accumulate(b, parts, high, values, b.add(place, _I64(UNIT // 2 * rows)))
                else:
                    _accumulate(b, parts, load_lanes(b, here, types.int8), values, place)
            scale_at = b.gep(scale_row, [b.mul(group.index, _I64(2 * LANES))])
            scale, low = load(b, scale_at, FLOATS), load(b, b.gep(scale_at, [_I64(LANES)]), FLOATS)
            for r, (part, total) in enumerate(zip(parts, totals, strict=True)):
                value = fma(b, scale, b.load(part), b.load(total))
                if packed:
                    group_sum = b.load(b.gep(group_sums, [b.add(b.mul(group.index, _I64(rows)), _I64(r))]))
                    value = fma(b, low, splat(b, group_sum), value)
                b.store(value, total)
        for total, out in zip(totals, outs, strict=True):
            store(b, b.load(total), out)
        return context.get_dummy_value()

    return signature, generate


def _accumulate(b: Any, sums: list[Any], lanes: Any, values: Any, place: Any) -> None:
    """Adds lanes · values[place + r] to sums[r]."""
    for r, total in enumerate(sums):
        value = splat(b, b.load(b.gep(values, [b.add(place, _I64(r))])))
        b.store(fma(b, lanes, value, b.load(total)), total)


def _halves(b: Any, pointer: Any) -> tuple[Any, Any]:
    wide = b.zext(load(b, pointer, _BYTES), _INTS)
    low, high = b.and_(wide, ir.Constant(_INTS, [15] * LANES)), b.lshr(wide, ir.Constant(_INTS, [4] * LANES))
    return b.sitofp(low, FLOATS), b.sitofp(high, FLOATS)


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
        result = cgutils.alloca_once_value(b, join_lanes(b, b.load(total), lambda b, x, y: b.fadd(x, y)))
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
        return join_lanes(b, b.load(joined), join)

    return signature, generate


def join_lanes(b: Any, vector: Any, join: Any) -> Any:
    n = LANES
    while n > 1:
        n //= 2
        low, high = (b.shuffle_vector(vector, vector, _index(range(start, start + n))) for start in (0, n))
        vector = join(b, low, high)
    return b.extract_element(vector, ir.IntType(32)(0))


def _index(places: Any) -> Any:
    places = list(places)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
