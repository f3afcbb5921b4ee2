"""The inner loops of sparse products are numba functions that LLVM sees as vectors of 16 lanes of float32.

LLVM's own vectoriser makes a product of one row of 4-bit codes more than ten times slower than this: it takes the
groups, not the weights of one, for the lanes. The vectors are LLVM's own, not those of an instruction set.

A unit is 32 weights that lie together, whatever their format, which is the element type of their array:

    float32              32 elements
    uint16: bfloat16     32 elements
    int8:   codes        32 elements
    uint8:  4-bit codes  16 elements: byte k holds code k in its low and code k + 16 in its high half
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
UNIT = 2 * LANES
# This is a cache line; the size of a record of codes is a multiple of it.
LINE = 64

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_I32, LANES)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)


@intrinsic
def dot_rows(_context, weights, at, x, units):  # type: ignore[no-untyped-def]
    """Returns Σ_k weights[a + k] x[k] for each offset a in the tuple `at`, over `units` of weights."""
    signature = types.UniTuple(types.float32, at.count)(weights, at, x, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        rows = row_pointers(context, b, signature, args, 0, 1)
        values = data_of(context, b, signature, args, 2)
        sums = [[cgutils.alloca_once_value(b, ZEROS) for _ in range(2)] for _ in rows]
        with cgutils.for_range(b, args[3]) as loop:
            halves = _load_floats(b, values, b.mul(loop.index, _I64(UNIT)))
            for row, total in zip(rows, sums, strict=True):
                for half, value, accumulator in zip(
                    _load_unit(b, row, loop.index, signature.args[0].dtype), halves, total, strict=True
                ):
                    b.store(fma(b, half, value, b.load(accumulator)), accumulator)
        results = [_horizontal_sum(b, _add(b, b.load(low), b.load(high))) for low, high in sums]
        return context.make_tuple(b, signature.return_type, results)

    return signature, generate


@intrinsic
def dot_code_rows(_context, codes, at, x, scales, scale_at, sums, groups):  # type: ignore[no-untyped-def]
    """Returns Σ_g scale_g Σ_k code_gk x_gk + low_g sums_g for each row of `groups` units of codes.

    The scales of a row begin at its `scale_at`, its lows behind them (none for 8 bits); `sums` ends in zeros up to a
    multiple of 16.
    """
    signature = types.UniTuple(types.float32, at.count)(codes, at, x, scales, scale_at, sums, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        dtype = signature.args[0].dtype
        rows = row_pointers(context, b, signature, args, 0, 1)
        scale_rows = row_pointers(context, b, signature, args, 3, 4)
        values, groups = data_of(context, b, signature, args, 2), args[6]
        totals = [cgutils.alloca_once_value(b, ZEROS) for _ in rows]
        with cgutils.for_range(b, groups) as loop:
            low, high = _load_floats(b, values, b.mul(loop.index, _I64(UNIT)))
            for row, scale_row, total in zip(rows, scale_rows, totals, strict=True):
                low_codes, high_codes = _load_unit(b, row, loop.index, dtype)
                part = fma(b, high_codes, high, b.fmul(low_codes, low))
                scale = splat(b, b.load(b.gep(scale_row, [loop.index])))
                b.store(fma(b, part, scale, b.load(total)), total)
        if dtype == types.uint8:
            group_sums = data_of(context, b, signature, args, 5)
            blocks = b.udiv(b.add(groups, _I64(LANES - 1)), _I64(LANES))
            with cgutils.for_range(b, blocks) as loop:
                first = b.mul(loop.index, _I64(LANES))
                lanes = b.add(splat(b, b.trunc(first, _I32)), ir.Constant(_INTS, list(range(LANES))))
                inside = b.icmp_signed("<", lanes, splat(b, b.trunc(groups, _I32)))
                group_sum = load(b, b.gep(group_sums, [first]), FLOATS)
                for scale_row, total in zip(scale_rows, totals, strict=True):
                    lows = load(b, b.gep(scale_row, [b.add(groups, first)]), FLOATS)
                    # What lies behind the lows is not a number.
                    lows = b.select(inside, lows, ZEROS)
                    b.store(fma(b, lows, group_sum, b.load(total)), total)
        results = [_horizontal_sum(b, b.load(total)) for total in totals]
        return context.make_tuple(b, signature.return_type, results)

    return signature, generate


@intrinsic
def add_rows(_context, weights, at, factors, y, y_at, units):  # type: ignore[no-untyped-def]
    """Adds Σ_r factors[r] weights[at[r] + k] to y[y_at + k], over `units` of weights. `at` and `factors` are tuples."""
    signature = types.void(weights, at, factors, y, types.int64, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        rows = row_pointers(context, b, signature, args, 0, 1)
        values = [splat(b, value) for value in cgutils.unpack_tuple(b, args[2])]
        y = b.gep(data_of(context, b, signature, args, 3), [args[4]])
        with cgutils.for_range(b, args[5]) as loop:
            first = b.mul(loop.index, _I64(UNIT))
            sums = list(_load_floats(b, y, first))
            for row, value in zip(rows, values, strict=True):
                halves = _load_unit(b, row, loop.index, signature.args[0].dtype)
                sums = [fma(b, half, value, total) for half, total in zip(halves, sums, strict=True)]
            _store_floats(b, y, first, sums)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_code_rows(  # type: ignore[no-untyped-def]
    _context, codes, offsets, first, last, step, factors, scales, scale_at, low_at, next_scales, factor_sum, y, units
):
    """Adds scale[u] Σ_r factors[r] codes[offsets[r] + u step] + low[u] factor_sum to y[u], for rows first ≤ r < last.

    u counts units of outputs, whose scales and lows (none for 8 bits) begin at `scale_at` and `low_at`. The rows are of
    one group, so they share their scales. The scales `next_scales` further on are prefetched.
    """
    signature = types.void(
        codes,
        offsets,
        types.int64,
        types.int64,
        types.int64,
        factors,
        scales,
        types.int64,
        types.int64,
        types.int64,
        types.float32,
        y,
        types.int64,
    )

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        dtype = signature.args[0].dtype
        codes, offsets = (data_of(context, b, signature, args, i) for i in (0, 1))
        first, last, step = args[2:5]
        factors, scales = (data_of(context, b, signature, args, i) for i in (5, 6))
        scale, low = b.gep(scales, [args[7]]), b.gep(scales, [args[8]])
        next_scales, factor_sum = args[9], splat(b, args[10])
        y = data_of(context, b, signature, args, 11)
        sums = [cgutils.alloca_once(b, FLOATS) for _ in range(2)]
        with cgutils.for_range(b, args[12]) as unit:
            for total in sums:
                b.store(ZEROS, total)
            here = b.gep(codes, [b.mul(unit.index, step)])
            with cgutils.for_range_slice(b, first, last, _I64(1), _I64) as (r, _):
                row = b.gep(here, [b.load(b.gep(offsets, [r]))])
                factor = splat(b, b.load(b.gep(factors, [r])))
                for half, total in zip(_load_unit(b, row, _I64(0), dtype), sums, strict=True):
                    b.store(fma(b, half, factor, b.load(total)), total)
            at = b.mul(unit.index, _I64(UNIT))
            for table in (scale, low):
                for line in range(0, UNIT * 4, LINE):
                    prefetch_line(b, b.gep(table, [b.add(b.add(at, next_scales), _I64(line // 4))]))
            values = list(_load_floats(b, y, at))
            if dtype == types.uint8:
                lows = _load_floats(b, low, at)
                values = [fma(b, a, factor_sum, value) for a, value in zip(lows, values, strict=True)]
            factors_of_unit = _load_floats(b, scale, at)
            values = [
                fma(b, a, b.load(total), value) for a, total, value in zip(factors_of_unit, sums, values, strict=True)
            ]
            _store_floats(b, y, at, values)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch(_context, array, at, lines):  # type: ignore[no-untyped-def]
    """Prefetches `lines` cache lines from element `at`."""
    signature = types.void(array, types.int64, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        first = b.bitcast(b.gep(data_of(context, b, signature, args, 0), [args[1]]), _I8.as_pointer())
        with cgutils.for_range(b, args[2]) as line:
            prefetch_line(b, b.gep(first, [b.mul(line.index, _I64(LINE))]))
        return context.get_dummy_value()

    return signature, generate


def data_of(context: Any, b: Any, signature: Any, args: Any, i: int) -> Any:
    return context.make_array(signature.args[i])(context, b, args[i]).data


def prefetch_line(b: Any, pointer: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    # The arguments mean: to be read, data, into the outer caches, because only few requests into the innermost cache
    # can be under way at a time.
    b.call(fetch, [b.bitcast(pointer, _I8.as_pointer()), _I32(0), _I32(1), _I32(1)])


def row_pointers(context: Any, b: Any, signature: Any, args: Any, array: int, offsets: int) -> list[Any]:
    data = data_of(context, b, signature, args, array)
    return [b.gep(data, [at]) for at in cgutils.unpack_tuple(b, args[offsets])]


def _load_unit(b: Any, row: Any, unit: Any, dtype: Any) -> tuple[Any, Any]:
    """Returns unit number `unit` of a row as two vectors of float32."""
    elements = LANES if dtype == types.uint8 else UNIT
    first = b.gep(row, [b.mul(unit, _I64(elements))])
    if dtype == types.uint8:
        wide = b.zext(load(b, first, ir.VectorType(_I8, LANES)), _INTS)
        low, high = b.and_(wide, ir.Constant(_INTS, [15] * LANES)), b.lshr(wide, ir.Constant(_INTS, [4] * LANES))
        return b.sitofp(low, FLOATS), b.sitofp(high, FLOATS)
    low, high = (load_lanes(b, first if at == 0 else b.gep(first, [_I64(at)]), dtype) for at in (0, LANES))
    return low, high


def load_lanes(b: Any, pointer: Any, dtype: Any) -> Any:
    if dtype == types.float32:
        return load(b, pointer, FLOATS)
    if dtype == types.int8:
        return b.sitofp(b.sext(load(b, pointer, ir.VectorType(_I8, LANES)), _INTS), FLOATS)
    assert dtype == types.uint16
    # A bfloat16 is the upper half of a float32.
    wide = b.zext(load(b, pointer, ir.VectorType(ir.IntType(16), LANES)), _INTS)
    return b.bitcast(b.shl(wide, ir.Constant(_INTS, [16] * LANES)), FLOATS)


def _load_floats(b: Any, array: Any, at: Any) -> tuple[Any, Any]:
    return load(b, b.gep(array, [at]), FLOATS), load(b, b.gep(array, [b.add(at, _I64(LANES))]), FLOATS)


def _store_floats(b: Any, array: Any, at: Any, values: list[Any]) -> None:
    for i, value in enumerate(values):
        store(b, value, b.gep(array, [b.add(at, _I64(i * LANES))]))


def store(b: Any, value: Any, pointer: Any) -> None:
    b.store(value, b.bitcast(pointer, FLOATS.as_pointer())).align = 4


def load(b: Any, pointer: Any, kind: Any) -> Any:
    value = b.load(b.bitcast(pointer, kind.as_pointer()))
    value.align = kind.element.width // 8 if isinstance(kind.element, ir.IntType) else 4
    return value


def splat(b: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _add(b: Any, x: Any, y: Any) -> Any:
    return b.fadd(x, y, flags=("contract",))


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _add(b, b.fmul(x, y, flags=("contract",)), z)


def _horizontal_sum(b: Any, vector: Any) -> Any:
    n = LANES
    while n > 1:
        n //= 2
        kind = ir.VectorType(_I32, n)
        low = b.shuffle_vector(vector, vector, ir.Constant(kind, list(range(n))))
        high = b.shuffle_vector(vector, vector, ir.Constant(kind, list(range(n, 2 * n))))
        vector = b.fadd(low, high)
    return b.extract_element(vector, _I32(0))
