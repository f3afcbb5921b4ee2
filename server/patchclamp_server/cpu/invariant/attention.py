"""The inner loops of attention over the KV cache: LLVM vectors of 16 keys, or of 16 channels of values.

Keys lie in tiles of 16, [dim, 16 keys], so that a vector holds 16 scores and no sum crosses its lanes; values lie one
behind the other, [keys, width]. Each score is one chain of fused multiply-adds in the order of the channels, and each
channel of an output one in the order of the keys, for however many queries at once: the bits of a row follow from the
order that is written down, and are the same on any number of threads and on any processor.

Keys and values are float32, bfloat16 (uint16) or codes (int8), by the type of their array.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.invariant.tiles import fma, join_lanes
from patchclamp_server.cpu.vector import (
    FLOATS,
    LANES,
    ZEROS,
    data_of,
    load,
    load_lanes,
    prefetch_line,
    row_pointers,
    splat,
    store,
)

# A vector is one register of 32, or two of 16: so many vectors of sums are kept in registers.
WIDE = bool(binding.get_host_cpu_features().get("avx512f", False))
_SUMS = 16 if WIDE else 4

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_INTS = ir.VectorType(_I32, LANES)

# exp(x) = 2^n exp(r), with r = x - n ln 2 in two parts and Cephes' polynomial of expf; the error is below 2 ulp.
_LOG2_E = 1.44269504
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# Added to a number of up to 22 bits, it leaves the nearest integer in the lower half of the sum's bits.
_ROUNDING = 12582912.0
# Below this, exp is no normal float32.
_SMALLEST = -87.0


@intrinsic
def score_keys(  # type: ignore[no-untyped-def]
    _context, q, q_at, keys, at, dim, scale, scales, scales_at, scores, scores_at, values, values_at
):
    """Sets scores[scores_at[r] + 16 t + j] = (Σ_d q[q_at + R d + r] keys[at[t] + 16 d + j]) · scale · s_tj for keys j
    of each tile t, with s_tj = scales[scales_at + 16 t + j]. The tuple `at` is of tiles, `scores_at` of R queries.

    The values of the same keys, which begin at values[values_at[t]], are prefetched in between.
    """
    signature = types.void(
        q, types.int64, keys, at, types.int64, types.float32, scales, types.int64, scores, scores_at, values, values_at
    )

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        dtype = signature.args[2].dtype
        queries = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        tiles = row_pointers(context, b, signature, args, 2, 3)
        outs = row_pointers(context, b, signature, args, 8, 9)
        next_values = row_pointers(context, b, signature, args, 10, 11)
        factor = splat(b, args[5])
        key_scales = b.gep(data_of(context, b, signature, args, 6), [args[7]])
        at_once = max(1, _SUMS // len(outs))
        for first_tile in range(0, len(tiles), at_once):
            own_tiles = tiles[first_tile : first_tile + at_once]
            sums = [[cgutils.alloca_once(b, FLOATS) for _ in own_tiles] for _ in outs]
            for row in sums:
                for total in row:
                    b.store(ZEROS, total)
            with cgutils.for_range(b, args[4]) as loop:
                first = b.mul(loop.index, _I64(LANES))
                lanes = [load_lanes(b, b.gep(tile, [first]), dtype) for tile in own_tiles]
                for tile in next_values[first_tile : first_tile + at_once]:
                    prefetch_line(b, b.gep(tile, [first]))
                place = b.mul(loop.index, _I64(len(outs)))
                for r, row in enumerate(sums):
                    value = splat(b, b.load(b.gep(queries, [b.add(place, _I64(r))])))
                    for keys_of_tile, total in zip(lanes, row, strict=True):
                        b.store(fma(b, keys_of_tile, value, b.load(total)), total)
            for t in range(len(own_tiles)):
                offset = _I64((first_tile + t) * LANES)
                own = load(b, b.gep(key_scales, [offset]), FLOATS)
                for out, row in zip(outs, sums, strict=True):
                    store(b, b.fmul(b.fmul(b.load(row[t]), factor), own), b.gep(out, [offset]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_values(  # type: ignore[no-untyped-def]
    _context, weights, weights_at, values, tiles, begin, end, width, z, z_at, keys, key_tiles
):
    """Adds Σ_j weights[weights_at[r] + j] values[tiles[j / 16] + (j mod 16) width + k] over keys begin ≤ j < end to
    z[z_at[r] + k], in the order of j.

    `weights_at` and `z_at` are tuples; `tiles` is an array of int64; `width` is a multiple of 16. As much of the keys
    that begin at keys[key_tiles[j / 16]] is prefetched in between.
    """
    signature = types.void(
        weights, weights_at, values, tiles, types.int64, types.int64, types.int64, z, z_at, keys, key_tiles
    )

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        dtype = signature.args[2].dtype
        factors = row_pointers(context, b, signature, args, 0, 1)
        cache, places = (data_of(context, b, signature, args, i) for i in (2, 3))
        begin, end, width = args[4:7]
        outs = row_pointers(context, b, signature, args, 7, 8)
        next_keys, next_places = (data_of(context, b, signature, args, i) for i in (9, 10))
        # Vectors run side by side, so that no sum waits for the one before: some at once, then the rest one by one.
        at_once = min(4, max(1, _SUMS // len(outs)))
        step = _I64(at_once * LANES)
        whole = b.mul(b.udiv(width, step), step)
        first_tile = b.udiv(begin, _I64(LANES))
        last_tile = b.udiv(b.add(end, _I64(LANES - 1)), _I64(LANES))
        for start, stop, vectors in ((_I64(0), whole, at_once), (whole, width, 1)):
            sums = [[cgutils.alloca_once(b, FLOATS) for _ in range(vectors)] for _ in outs]
            with cgutils.for_range_slice(b, start, stop, _I64(vectors * LANES), _I64) as (k, _):
                channels = [b.add(k, _I64(i * LANES)) for i in range(vectors)]
                for out, row in zip(outs, sums, strict=True):
                    for channel, total in zip(channels, row, strict=True):
                        b.store(load(b, b.gep(out, [channel]), FLOATS), total)
                with cgutils.for_range_slice(b, first_tile, last_tile, _I64(1), _I64) as (tile, _):
                    base = b.mul(tile, _I64(LANES))
                    here = b.gep(cache, [b.load(b.gep(places, [tile]))])
                    ahead = b.gep(next_keys, [b.load(b.gep(next_places, [tile]))])
                    first = b.select(b.icmp_signed(">", begin, base), b.sub(begin, base), _I64(0))
                    rest = b.sub(end, base)
                    last = b.select(b.icmp_signed("<", rest, _I64(LANES)), rest, _I64(LANES))
                    with cgutils.for_range_slice(b, first, last, _I64(1), _I64) as (j, _):
                        key = b.gep(here, [b.mul(j, width)])
                        lanes = [load_lanes(b, b.gep(key, [channel]), dtype) for channel in channels]
                        for channel in channels:
                            prefetch_line(b, b.gep(ahead, [b.add(b.mul(j, width), channel)]))
                        for factor, row in zip(factors, sums, strict=True):
                            weight = splat(b, b.load(b.gep(factor, [b.add(base, j)])))
                            for value, total in zip(lanes, row, strict=True):
                                b.store(fma(b, weight, value, b.load(total)), total)
                for out, row in zip(outs, sums, strict=True):
                    for channel, total in zip(channels, row, strict=True):
                        store(b, b.load(total), b.gep(out, [channel]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def exponentials_from(_context, x, at, n, largest):  # type: ignore[no-untyped-def]
    """Sets x[at + k] ← exp(x[at + k] - largest) over k < n, a multiple of 16, float32, and returns their sum: that of
    each lane, and these by halves. NaN stays; below exp(-87) it is 0; what is above `largest` has no meaning."""
    signature = types.float32(x, types.int64, types.int64, types.float32)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        array = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        most = splat(b, args[3])
        total = cgutils.alloca_once_value(b, ZEROS)
        with cgutils.for_range_slice(b, _I64(0), args[2], _I64(LANES), _I64) as (k, _):
            here = b.gep(array, [k])
            value = _exponential(b, b.fsub(load(b, here, FLOATS), most))
            store(b, value, here)
            b.store(b.fadd(b.load(total), value), total)
        return join_lanes(b, b.load(total), lambda b, x, y: b.fadd(x, y))

    return signature, generate


def _exponential(b: Any, x: Any) -> Any:
    """Returns exp(x) of a vector x ≤ 0."""
    rounding = _all(_ROUNDING)
    # NaN is not small, and so comes through.
    small = b.fcmp_ordered("<", x, _all(_SMALLEST))
    v = b.select(small, _all(_SMALLEST), x)
    shifted = fma(b, v, _all(_LOG2_E), rounding)
    power = b.fsub(shifted, rounding)
    r = fma(b, power, _all(-_LN2_HIGH), v)
    r = fma(b, power, _all(-_LN2_LOW), r)
    p = _all(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = fma(b, p, r, _all(coefficient))
    p = fma(b, p, b.fmul(r, r), r)
    p = b.fadd(p, _all(1.0))
    # The integer stands in the low bits of `shifted`; in the place of the exponent it multiplies by its power of 2.
    exponent = b.shl(b.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    scaled = b.bitcast(b.add(b.bitcast(p, _INTS), exponent), FLOATS)
    # The sum of bits of a NaN may be a number.
    scaled = b.select(b.fcmp_unordered("uno", x, x), x, scaled)
    return b.select(small, ZEROS, scaled)


def _all(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)
