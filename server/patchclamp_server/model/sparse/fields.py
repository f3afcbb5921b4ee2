"""Products of codes of a few bits, packed into words of 32: numba functions around vectors of 16 words.

A word holds 32 // bits codes, its fields; the first is in the lowest bits. A field is taken where it stands, without a
shift: `word & mask` is code · 2^(bits · k), a float32 holds it exactly, and what it is multiplied with comes divided by
the same power of two (`unshifted`). One weight costs a third of an instruction less, which is the time of a product.

Scales and lows are bfloat16, as uint16. numba's cache looks at this file alone: a change in vector.py needs one here.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, var-annotated"

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.model.sparse import vector
from patchclamp_server.model.sparse.vector import LANES, LINE, prefetch

WORD = 32
# How many records ahead those of chosen inputs are asked for.
_AHEAD = 8

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_I32, LANES)

_compiled = numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)


@intrinsic(prefer_literal=True)
def dot_fields(_context, words, at, x, per_group, scales, scale_at, sums, groups, y, y_at, bits):  # type: ignore[no-untyped-def]
    """y[y_at + lane] = Σ_g scale_g Σ_k code_gk x_gk + low_g sums_g, for each 16 outputs in the tuple `at`.

    A group of 16 outputs has `per_group` vectors of words; x is `unshifted`, with as many values as there are fields.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    width = bits.literal_value
    signature = types.void(
        words, at, x, types.int64, scales, scale_at, sums, types.int64, y, y_at, types.IntegerLiteral(width)
    )

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        outputs = vector.row_pointers(context, b, signature, args, 0, 1)
        values = vector.data_of(context, b, signature, args, 2)
        per_group, groups = args[3], args[7]
        scale_rows = vector.row_pointers(context, b, signature, args, 4, 5)
        sums = vector.data_of(context, b, signature, args, 6)
        results = vector.row_pointers(context, b, signature, args, 8, 9)
        totals = [cgutils.alloca_once_value(b, vector.ZEROS) for _ in outputs]
        parts = [cgutils.alloca_once(b, vector.FLOATS) for _ in outputs]
        with cgutils.for_range(b, groups) as group:
            for part in parts:
                b.store(vector.ZEROS, part)
            with cgutils.for_range(b, per_group) as word:
                at = b.add(b.mul(group.index, per_group), word.index)
                loaded = [vector.load(b, b.gep(row, [b.mul(at, _I64(LANES))]), _WORDS) for row in outputs]
                first = b.gep(values, [b.mul(at, _I64(WORD // width))])
                sums_so_far = [b.load(part) for part in parts]
                for k in range(WORD // width):
                    value = vector.splat(b, b.load(b.gep(first, [_I64(k)])))
                    sums_so_far = [
                        vector.fma(b, _field(b, word_of_row, width, k), value, total)
                        for word_of_row, total in zip(loaded, sums_so_far, strict=True)
                    ]
                for part, total in zip(parts, sums_so_far, strict=True):
                    b.store(total, part)
            group_sum = vector.splat(b, b.load(b.gep(sums, [group.index])))
            for part, total, scale_row in zip(parts, totals, scale_rows, strict=True):
                scale, low = (
                    vector.load_lanes(
                        b, b.gep(scale_row, [b.add(b.mul(group.index, _I64(2 * LANES)), _I64(offset))]), types.uint16
                    )
                    for offset in (0, LANES)
                )
                lows = vector.fma(b, low, group_sum, b.load(total))
                b.store(vector.fma(b, b.load(part), scale, lows), total)
        for total, result in zip(totals, results, strict=True):
            vector.store(b, b.load(total), result)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def add_fields(_context, words, at, factors, factors_at, blocks, steps, y, bits):  # type: ignore[no-untyped-def]
    """y += Σ_r factors_r[group] codes_r, for the inputs r of the tuple `at`.

    Vector v of an input's words holds, in field k, block k · blocks · steps + v of 16 outputs; `blocks` are a group.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    width = bits.literal_value
    signature = types.void(words, at, factors, factors_at, types.int64, types.int64, y, types.IntegerLiteral(width))

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        inputs = vector.row_pointers(context, b, signature, args, 0, 1)
        factors = vector.row_pointers(context, b, signature, args, 2, 3)
        blocks, steps = args[4], args[5]
        y = vector.data_of(context, b, signature, args, 6)
        stride = b.mul(b.mul(blocks, steps), _I64(LANES))
        with cgutils.for_range(b, steps) as step, cgutils.for_range(b, blocks) as block:
            at = b.mul(b.add(b.mul(step.index, blocks), block.index), _I64(LANES))
            loaded = [vector.load(b, b.gep(row, [at]), _WORDS) for row in inputs]
            for k in range(WORD // width):
                place = b.gep(y, [b.add(at, b.mul(stride, _I64(k)))])
                total = vector.load(b, place, vector.FLOATS)
                group = b.add(step.index, b.mul(steps, _I64(k)))
                for word, row_factors in zip(loaded, factors, strict=True):
                    factor = vector.splat(b, b.load(b.gep(row_factors, [group])))
                    total = vector.fma(b, _field(b, word, width, k), factor, total)
                vector.store(b, total, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def scale_factors(_context, scales, at, factor, places, table, table_at, lows, groups):  # type: ignore[no-untyped-def]
    """table[table_at + g] = factor places[g] scale_g and lows[g] += factor low_g, the lows behind the scales."""
    signature = types.void(scales, types.int64, types.float32, places, table, types.int64, lows, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        scales, places, table, lows = (vector.data_of(context, b, signature, args, i) for i in (0, 3, 4, 6))
        factor, groups = vector.splat(b, args[2]), args[7]
        with cgutils.for_range(b, b.udiv(groups, _I64(LANES))) as loop:
            first = b.mul(loop.index, _I64(LANES))
            at = b.add(args[1], first)
            scale, low = (vector.load_lanes(b, b.gep(scales, [i]), types.uint16) for i in (at, b.add(at, groups)))
            place = vector.load(b, b.gep(places, [first]), vector.FLOATS)
            product = b.fmul(b.fmul(scale, place), factor)
            vector.store(b, product, b.gep(table, [b.add(args[5], first)]))
            total = b.gep(lows, [first])
            vector.store(b, vector.fma(b, low, factor, vector.load(b, total, vector.FLOATS)), total)
        return context.get_dummy_value()

    return signature, generate


def _field(b, word, bits, k):  # type: ignore[no-untyped-def]
    """Code k of the words times 2^(bits · k), or the code itself in the topmost bits: shifted, it needs no mask."""
    if (k + 1) * bits == WORD:
        return b.sitofp(b.lshr(word, ir.Constant(_WORDS, [k * bits] * LANES)), vector.FLOATS)
    mask = (2**bits - 1) << (k * bits)
    return b.sitofp(b.and_(word, ir.Constant(_WORDS, [mask] * LANES)), vector.FLOATS)


@numba.njit(nogil=True, cache=True)
def unshifted(bits, k):  # type: ignore[no-untyped-def]
    """What undoes the place of field k: a power of two."""
    if (k + 1) * bits == WORD:
        return np.float32(1)
    return np.float32(1) / np.float32(1 << (bits * k))


@_compiled
def spread(x, group, per_group, bits, spread_x, sums):  # type: ignore[no-untyped-def]
    """x [width] by groups and fields, `unshifted`, where there is no weight 0; and the sum of each group."""
    fields = WORD // bits
    size = per_group * fields
    for g in range(sums.shape[0]):
        total = np.float32(0)
        for k in range(group):
            value = x[g * group + k]
            total += value
            spread_x[g * size + k] = value * unshifted(bits, k % fields)
        sums[g] = total


@_compiled
def multiply_fields(words, scales, x, sums, bits, y, start, end):  # type: ignore[no-untyped-def]
    """y[16 i + lane] for start ≤ i < end: the product with all outputs.

    words [out / 16, groups, vectors, 16], scales [out / 16, groups, scale and low, 16]; x and sums from `spread`.
    """
    _, groups, per_group, _ = words.shape
    size, scale_size = groups * per_group * LANES, groups * 2 * LANES
    flat, flat_scales = words.reshape(-1), scales.reshape(-1)
    for i in range(start, end, 4):
        # Past the end the last is repeated.
        p, q, r = min(i + 1, end - 1), min(i + 2, end - 1), min(i + 3, end - 1)
        at = (i * size, p * size, q * size, r * size)
        s_at = (i * scale_size, p * scale_size, q * scale_size, r * scale_size)
        y_at = (i * LANES, p * LANES, q * LANES, r * LANES)
        if bits == 2:
            dot_fields(flat, at, x, per_group, flat_scales, s_at, sums, groups, y, y_at, 2)
        elif bits == 3:
            dot_fields(flat, at, x, per_group, flat_scales, s_at, sums, groups, y, y_at, 3)
        elif bits == 4:
            dot_fields(flat, at, x, per_group, flat_scales, s_at, sums, groups, y, y_at, 4)
        else:
            dot_fields(flat, at, x, per_group, flat_scales, s_at, sums, groups, y, y_at, 8)


@_compiled
def sum_fields(words, scales, factors, index, blocks, bits, y, start, end):  # type: ignore[no-untyped-def]
    """y += Σ_i factors[i] (input index[i]) for start ≤ i < end.

    words [in, vectors · 16], scales [in, scale and low, groups], y [groups · blocks · 16]: `add_fields` says in which
    order. The number of groups is filled up to a multiple of 16 in the scales, and to whole fields in y.
    """
    fields = WORD // bits
    groups = scales.shape[2]
    size = words.shape[1]
    steps = size // LANES // blocks
    flat, flat_scales = words.reshape(-1), scales.reshape(-1)
    lines, scale_lines = size * 4 // LINE, (groups * 4 + LINE - 1) // LINE
    places = np.zeros(groups, dtype=np.float32)
    for g in range(min(groups, fields * steps)):
        places[g] = unshifted(bits, g // steps)
    lows = np.zeros(groups, dtype=np.float32)
    table = np.empty(4 * groups, dtype=np.float32)
    row_factors = (0, groups, 2 * groups, 3 * groups)
    for i in range(start, min(end, start + _AHEAD)):
        prefetch(flat, index[i] * size, lines)
        prefetch(flat_scales, index[i] * 2 * groups, scale_lines)
    for i in range(start, end, 4):
        for r in range(i + _AHEAD, min(end, i + _AHEAD + 4)):
            prefetch(flat, index[r] * size, lines)
            prefetch(flat_scales, index[r] * 2 * groups, scale_lines)
        for r in range(4):
            # Past the end the last is repeated, times 0.
            factor = factors[i + r] if i + r < end else np.float32(0)
            scale_at = index[min(i + r, end - 1)] * 2 * groups
            scale_factors(flat_scales, scale_at, factor, places, table, r * groups, lows, groups)
        a, b, c, d = index[i], index[min(i + 1, end - 1)], index[min(i + 2, end - 1)], index[min(i + 3, end - 1)]
        at = (a * size, b * size, c * size, d * size)
        if bits == 2:
            add_fields(flat, at, table, row_factors, blocks, steps, y, 2)
        elif bits == 3:
            add_fields(flat, at, table, row_factors, blocks, steps, y, 3)
        elif bits == 4:
            add_fields(flat, at, table, row_factors, blocks, steps, y, 4)
        else:
            add_fields(flat, at, table, row_factors, blocks, steps, y, 8)
    for g in range(fields * steps):
        for k in range(blocks * LANES):
            y[g * blocks * LANES + k] += lows[g]


# Rounded twice, as torch does: what is unpacked is what was packed.
_rounded = numba.njit(nogil=True, cache=True)


@_rounded
def unpack_outputs(words, scales, group, bits, columns):  # type: ignore[no-untyped-def]
    """columns [in, out / 16 · 16] = scale · code + low, for the words of `multiply_fields` and scales in float32."""
    blocks, groups, _, _ = words.shape
    fields, mask = WORD // bits, np.int32(2**bits - 1)
    for block in range(blocks):
        for g in range(groups):
            scale, low = scales[block, g, 0], scales[block, g, 1]
            for k in range(group):
                word, shift = words[block, g, k // fields], np.int32(k % fields * bits)
                column = columns[g * group + k, block * LANES : block * LANES + LANES]
                for lane in range(LANES):
                    # Explicit int32: numba widens to 64 bits, which halves the lanes of a register.
                    code = np.int32(np.int32(word[lane] >> shift) & mask)
                    column[lane] = np.float32(code) * scale[lane] + low[lane]


@_rounded
def unpack_inputs(words, scales, blocks, bits, rows):  # type: ignore[no-untyped-def]
    """rows [in, groups, group] = scale · code + low, for the words of `sum_fields` and scales in float32."""
    n, groups, group = rows.shape
    steps = words.shape[1] // LANES // blocks
    mask = np.int32(2**bits - 1)
    for i in range(n):
        for g in range(groups):
            first, shift = g % steps * blocks * LANES, np.int32(g // steps * bits)
            word, row = words[i, first : first + group], rows[i, g]
            scale, low = scales[i, 0, g], scales[i, 1, g]
            for k in range(group):
                code = np.int32(np.int32(word[k] >> shift) & mask)
                row[k] = np.float32(code) * scale + low
