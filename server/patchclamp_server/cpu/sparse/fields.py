"""These numba functions around vectors of 16 words multiply codes of a few bits by x in 16 bits.

A word of 32 bits is two halves of 16, and a half holds 16 // bits codes, its fields; the first is in the lowest bits.
Shifted and masked, a vector of words is 32 integers of 16 bits, and its product with pairs of x, summed in pairs, is
one instruction where there is one (x86: vpdpwssd, or vpmaddwd and an addition).

Scales and lows are bfloat16, as uint16. numba's cache looks at this file alone: a change in vector.py needs one here.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, var-annotated"

import math

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu import vector
from patchclamp_server.cpu.vector import LANES

HALF = 16
# Smaller steps have no inverse in float32, so such a group counts as zeros.
_LEAST = np.float32(1.2e-38)
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(ir.IntType(HALF), 2 * LANES)
_PRODUCTS = ir.VectorType(_I32, 2 * LANES)
_EVEN, _ODD = (ir.Constant(_WORDS, list(range(first, 2 * LANES, 2))) for first in (0, 1))

_compiled = numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)


@intrinsic(prefer_literal=True)
def dot_fields(_context, words, at, x, vectors, scales, scale_at, steps, sums, groups, y, y_at, bits):  # type: ignore[no-untyped-def]
    """Sets y[y_at + lane] = Σ_g scale_g steps_g (Σ_k code_gk x_gk) + low_g sums_g, for each of `at`: 16 outputs.

    A group of 16 outputs has `vectors` vectors of words; x has pairs of 16 bits, as many as a word has fields in a
    half.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    width = bits.literal_value
    signature = types.void(
        words, at, x, types.int64, scales, scale_at, steps, sums, types.int64, y, y_at, types.IntegerLiteral(width)
    )

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        outputs = vector.row_pointers(context, b, signature, args, 0, 1)
        pairs, steps, sums = (vector.data_of(context, b, signature, args, i) for i in (2, 6, 7))
        vectors, groups = args[3], args[8]
        scale_rows = vector.row_pointers(context, b, signature, args, 4, 5)
        results = vector.row_pointers(context, b, signature, args, 9, 10)
        totals = [cgutils.alloca_once_value(b, vector.ZEROS) for _ in outputs]
        parts = [cgutils.alloca_once(b, _WORDS) for _ in outputs]
        with cgutils.for_range(b, groups) as group:
            for part in parts:
                b.store(ir.Constant(_WORDS, [0] * LANES), part)
            with cgutils.for_range(b, vectors) as loop:
                at = b.add(b.mul(group.index, vectors), loop.index)
                first = b.gep(pairs, [b.mul(at, _I64(HALF // width))])
                loaded = [vector.load(b, b.gep(row, [b.mul(at, _I64(LANES))]), _WORDS) for row in outputs]
                for k in range(HALF // width):
                    pair = b.bitcast(vector.splat(b, b.load(b.gep(first, [_I64(k)]))), _HALVES)
                    for word, part in zip(loaded, parts, strict=True):
                        codes = _field(b, b.bitcast(word, _HALVES), width, k)
                        products = b.mul(b.sext(codes, _PRODUCTS), b.sext(pair, _PRODUCTS))
                        even, odd = (b.shuffle_vector(products, products, lanes) for lanes in (_EVEN, _ODD))
                        b.store(b.add(b.load(part), b.add(even, odd)), part)
            step, group_sum = (vector.splat(b, b.load(b.gep(table, [group.index]))) for table in (steps, sums))
            for part, total, scale_row in zip(parts, totals, scale_rows, strict=True):
                here = b.gep(scale_row, [b.mul(group.index, _I64(2 * LANES))])
                scale, low = (vector.load_lanes(b, b.gep(here, [_I64(i)]), types.uint16) for i in (0, LANES))
                lows = vector.fma(b, low, group_sum, b.load(total))
                product = b.sitofp(b.load(part), vector.FLOATS)
                b.store(vector.fma(b, product, b.fmul(scale, step), lows), total)
        for total, result in zip(totals, results, strict=True):
            vector.store(b, b.load(total), result)
        return context.get_dummy_value()

    return signature, generate


def _field(b, halves, bits, k):  # type: ignore[no-untyped-def]
    """Returns codes k of the halves."""
    if k:
        halves = b.lshr(halves, ir.Constant(_HALVES, [k * bits] * 2 * LANES))
    if (k + 1) * bits == HALF:
        return halves
    return b.and_(halves, ir.Constant(_HALVES, [2**bits - 1] * 2 * LANES))


@_compiled
def round_groups(x, group, rounded, steps, sums):  # type: ignore[no-untyped-def]
    """Rounds x [width] ≈ steps_g · rounded [groups, group padded with 0] (int16), and sums the rounded groups.

    Where a group of x has a number that is not finite, its sum is that of x.
    """
    for g in range(rounded.shape[0]):
        most, total = np.float32(0), np.float32(0)
        for k in range(group):
            value = x[g * group + k]
            most = max(most, abs(value))
            total += value
        step = most / np.float32(32767)
        if step < _LEAST:
            step = np.float32(0)
        inverse = np.float32(1) / step if step > 0 else np.float32(0)
        whole = 0
        for k in range(group):
            rounded[g, k] = np.int16(np.rint(x[g * group + k] * inverse))
            whole += rounded[g, k]
        steps[g], sums[g] = step, step * np.float32(whole) if math.isfinite(total) else total


@_compiled
def multiply_fields(words, scales, x, steps, sums, bits, y, start, end):  # type: ignore[no-untyped-def]
    """Computes y[16 i + lane] for start ≤ i < end.

    words are [out / 16, groups, vectors, 16] and scales [out / 16, groups, scale and low, 16]; x, steps and sums come
    from `round_groups`, x as int32.
    """
    _, groups, vectors, _ = words.shape
    size, scale_size = groups * vectors * LANES, groups * 2 * LANES
    flat, flat_scales = words.reshape(-1), scales.reshape(-1)
    for i in range(start, end, 4):
        # Past the end the last block is repeated.
        p, q, r = min(i + 1, end - 1), min(i + 2, end - 1), min(i + 3, end - 1)
        at = (i * size, p * size, q * size, r * size)
        s_at = (i * scale_size, p * scale_size, q * scale_size, r * scale_size)
        y_at = (i * LANES, p * LANES, q * LANES, r * LANES)
        if bits == 2:
            dot_fields(flat, at, x, vectors, flat_scales, s_at, steps, sums, groups, y, y_at, 2)
        elif bits == 3:
            dot_fields(flat, at, x, vectors, flat_scales, s_at, steps, sums, groups, y, y_at, 3)
        elif bits == 4:
            dot_fields(flat, at, x, vectors, flat_scales, s_at, steps, sums, groups, y, y_at, 4)
        else:
            dot_fields(flat, at, x, vectors, flat_scales, s_at, steps, sums, groups, y, y_at, 8)


# Contraction is not allowed: rounded twice, as torch does, the unpacked values are those that were packed.
@numba.njit(nogil=True, cache=True)
def unpack_fields(words, scales, group, bits, columns):  # type: ignore[no-untyped-def]
    """Sets columns [in, out / 16 · 16] = scale · code + low, for the words of `multiply_fields` and float32 scales."""
    blocks, groups, _, _ = words.shape
    fields, mask = HALF // bits, np.int32(2**bits - 1)
    for block in range(blocks):
        for g in range(groups):
            scale, low = scales[block, g, 0], scales[block, g, 1]
            for k in range(group):
                word = words[block, g, k // (2 * fields)]
                shift = np.int32(k // 2 % fields * bits + k % 2 * HALF)
                column = columns[g * group + k, block * LANES : block * LANES + LANES]
                for lane in range(LANES):
                    # It is an explicit int32, because numba widens to 64 bits, which halves the lanes of a register.
                    code = np.int32(np.int32(word[lane] >> shift) & mask)
                    column[lane] = np.float32(code) * scale[lane] + low[lane]
