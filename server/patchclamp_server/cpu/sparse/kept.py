"""Sums over the neurons that are not 0: y += Σ_j h_j W[:, j], for 4-bit codes and h in 8 bits. The others are not read.

    W[o, j] = scale[g, o] code[o, j] + low[g, o],    h_j ≈ s_g q_j    for the neurons j of a group g
    y_o = Σ_g scale[g, o] s_g Σ_j code[o, j] q_j + low[g, o] s_g Σ_j q_j

s_g is the largest |h_j| of the group over 127, as in integers/rounding.py, so that two codes of 15 and two q of 127
stay in 16 bits, and eight such pairs too. A neuron's codes lie together, in units of 64 outputs; two neurons are
multiplied at a time, their bytes side by side.
"""

# llvmlite's builders and what numba compiles have no types, and an intrinsic's first argument is not its caller's.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, call-arg, attr-defined, var-annotated"

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from patchclamp_server.cpu.atomics import floats_at, keep
from patchclamp_server.cpu.formats.lanes import I8, I16, I64, INTS, floats_of_halves, host_has
from patchclamp_server.cpu.invariant.tiles import fma
from patchclamp_server.cpu.memory import aligned_records
from patchclamp_server.cpu.sparse.codes import Codes
from patchclamp_server.cpu.vector import FLOATS, LANES, LINE, load, prefetch_line, splat, store

# Outputs of a unit, and the bytes that hold their codes. Byte 16 L + j has the codes of outputs 8 L + j and 16 more in
# its halves, and byte 16 L + 8 + j those of 32 and 48 more: bytes of two neurons side by side give 16 sums in order.
UNIT, UNIT_BYTES = 64, 32
MOST_OF_GROUP = 32
# A sum over neurons has so many parts, which threads share, and so the same bits whatever the threads.
SUMS = 8
_PAIRS = 8
_AHEAD = 3
_LARGEST, _SMALLEST = np.float32(127), np.float32(1.5e-36)
_BYTES, _SHORTS = ir.VectorType(I8, UNIT_BYTES), ir.VectorType(I16, LANES)
_BYTE_POINTER, _FLOAT_POINTER = I8.as_pointer(), ir.FloatType().as_pointer()
_BY_TWO = [
    [lane * 16 + first + k + row * UNIT_BYTES for lane in range(2) for k in range(8) for row in range(2)]
    for first in (0, 8)
]

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True, eq=False)
class KeptInputs:
    """records [in, bytes] have the codes of an input; scales [groups, units, scale and low, 64] are float16 where that
    holds them, else float32."""

    records: NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.float32]
    group: int
    out: int

    @classmethod
    def of(cls, codes: Codes) -> "KeptInputs | None":
        """Returns the copy of codes of 4 bits, whose groups have at most 32 inputs, or else None."""
        if codes.lows is None or codes.group > MOST_OF_GROUP:
            return None
        out, width = codes.codes.shape
        units = -(-out // UNIT)
        columns = np.zeros((width, units * UNIT), dtype=np.uint8)
        columns[:, :out] = codes.codes.T
        # [in, units, which sixteen, lane, byte]
        own = columns.reshape(width, units, 4, 2, 8)
        halves = own[:, :, 0::2] | own[:, :, 1::2] << 4  # [in, units, first or last eight of 16 bytes, lane, byte]
        records = aligned_records(width, units * UNIT_BYTES)
        records[:, : units * UNIT_BYTES] = halves.transpose(0, 1, 3, 2, 4).reshape(width, -1)
        scales = np.zeros((codes.scales.shape[1], 2, units * UNIT), dtype=np.float32)
        scales[:, 0, :out], scales[:, 1, :out] = codes.scales.T, codes.lows.T
        by_unit = np.ascontiguousarray(scales.reshape(-1, 2, units, UNIT).transpose(0, 2, 1, 3))
        with np.errstate(over="ignore"):
            short = by_unit.astype(np.float16)
        exact = bool((short.astype(np.float32) == by_unit).all())
        return cls(records, short if exact else by_unit, codes.group, out)

    @property
    def units(self) -> int:
        return int(self.scales.shape[1])

    def sum(self, neurons: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns y [T, out] of neurons [T, in]."""
        neurons = np.ascontiguousarray(neurons)
        y = np.empty((len(neurons), self.out), dtype=np.float32)
        _sum_rows(neurons, self.records, self.scales.view(np.uint8), self.scales.itemsize == 2, self.group, y)
        return y

    @property
    def nbytes(self) -> int:
        return self.records.nbytes + self.scales.nbytes


@intrinsic(prefer_literal=True)
def _add_pairs(_context, halves, starts, factors, pairs, scales, step, total, y, units):
    """Adds scale[u] step Σ_p Σ_r codes[starts[2 p + r] + u] q[2 p + r] + low[u] total to y[u]: addresses and float32.

    factors has the two bytes q of each pair, starts the addresses of their records.
    """
    signature = types.void(
        halves, types.int64, types.int64, types.int64, types.int64, types.float32, types.float32, types.int64,
        types.int64,
    )  # fmt: skip
    size = 2 if halves.literal_value else 4

    def generate(context, b, signature, args):
        starts, factors = (b.inttoptr(arg, kind.as_pointer()) for arg, kind in ((args[1], I64), (args[2], I16)))
        pairs, scales, units = args[3], b.inttoptr(args[4], _BYTE_POINTER), args[8]
        step, total, y = splat(b, args[5]), splat(b, args[6]), b.inttoptr(args[7], _FLOAT_POINTER)
        wide = [cgutils.alloca_once(b, INTS) for _ in range(4)]
        short = [cgutils.alloca_once(b, _SHORTS) for _ in range(4)]
        fifteen = ir.Constant(_BYTES, [15] * UNIT_BYTES)
        four = ir.Constant(_BYTES, [4] * UNIT_BYTES)
        with cgutils.for_range(b, units) as unit:
            skip = b.mul(unit.index, I64(UNIT_BYTES))
            for sums in wide:
                b.store(ir.Constant(INTS, [0] * LANES), sums)
            with cgutils.for_range_slice(b, I64(0), pairs, I64(_PAIRS), I64) as (first, _):
                for sums in short:
                    b.store(ir.Constant(_SHORTS, [0] * LANES), sums)
                end = b.add(first, I64(_PAIRS))
                end = b.select(b.icmp_signed("<", end, pairs), end, pairs)
                with cgutils.for_range_slice(b, first, end, I64(1), I64) as (p, _):
                    rows = [b.load(b.gep(starts, [b.add(b.mul(p, I64(2)), I64(r))])) for r in range(2)]
                    own = [load(b, b.inttoptr(b.add(row, skip), _BYTE_POINTER), _BYTES) for row in rows]
                    q = b.load(b.gep(factors, [p]))
                    for i, order in enumerate(_BY_TWO):
                        both = b.shuffle_vector(*own, ir.Constant(ir.VectorType(ir.IntType(32), UNIT_BYTES), order))
                        for k, codes in enumerate((b.and_(both, fifteen), b.lshr(both, four))):
                            sums = short[2 * i + k]
                            b.store(b.add(b.load(sums), _products(b, codes, q)), sums)
                for sums, own in zip(wide, short, strict=True):
                    b.store(b.add(b.load(sums), b.sext(b.load(own), INTS)), sums)
            row = b.mul(unit.index, I64(2 * UNIT * size))
            for i, sums in enumerate(wide):
                scale, low = (
                    _scales(b, b.gep(scales, [b.add(row, I64((part * UNIT + i * LANES) * size))]), size)
                    for part in range(2)
                )
                place = b.gep(y, [b.add(b.mul(unit.index, I64(UNIT)), I64(i * LANES))])
                value = fma(b, low, total, load(b, place, FLOATS))
                store(b, fma(b, scale, b.fmul(b.sitofp(b.load(sums), FLOATS), step), value), place)
        return context.get_dummy_value()

    return signature, generate


def _scales(b: Any, pointer: Any, size: int) -> Any:
    return floats_of_halves(b, pointer) if size == 2 else load(b, pointer, FLOATS)


def _products(b: Any, codes: Any, q: Any) -> Any:
    """Returns c_0 q_0 + c_1 q_1 for 16 pairs of bytes, and the two signed bytes of q."""
    splatted = b.shuffle_vector(
        b.insert_element(ir.Constant(_SHORTS, ir.Undefined), q, ir.IntType(32)(0)),
        ir.Constant(_SHORTS, ir.Undefined),
        ir.Constant(INTS, [0] * LANES),
    )
    if host_has("avx2"):
        kind = ir.FunctionType(_SHORTS, [_BYTES, _BYTES])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx2.pmadd.ub.sw")
        return b.call(function, [codes, b.bitcast(splatted, _BYTES)])
    eight = ir.Constant(_SHORTS, [8] * LANES)
    c = b.bitcast(codes, _SHORTS)
    even = b.mul(b.and_(c, ir.Constant(_SHORTS, [255] * LANES)), b.ashr(b.shl(splatted, eight), eight))
    return b.add(even, b.mul(b.lshr(c, eight), b.ashr(splatted, eight)))


@intrinsic
def _ask(_context, address, lines):
    """Asks for so many cache lines from an address on."""
    signature = types.void(types.int64, types.int64)

    def generate(context, b, signature, args):
        first = b.inttoptr(args[0], _BYTE_POINTER)
        with cgutils.for_range(b, args[1]) as line:
            prefetch_line(b, b.gep(first, [b.mul(line.index, I64(LINE))]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def count_from(_context, bits, n, least):
    """Returns how many of n int32 at an address are not below `least`; n is a multiple of 16."""
    signature = types.int64(types.int64, types.int64, types.int32)

    def generate(context, b, signature, args):
        bits, bound = b.inttoptr(args[0], ir.IntType(32).as_pointer()), splat(b, args[2])
        total = cgutils.alloca_once_value(b, ir.Constant(INTS, [0] * LANES))
        with cgutils.for_range_slice(b, I64(0), args[1], I64(LANES), I64) as (k, _):
            own = load(b, b.gep(bits, [k]), INTS)
            b.store(b.sub(b.load(total), b.sext(b.icmp_signed(">=", own, bound), INTS)), total)
        sums, count = b.load(total), I64(0)
        for lane in range(LANES):
            count = b.add(count, b.zext(b.extract_element(sums, ir.IntType(32)(lane)), I64))
        return count

    return signature, generate


@_compiled
def keep_largest(h, norms, k, forced, bits):
    """Zeros all of h [n] but the k largest |h_j| norms[j], of equal ones the first, and those with forced[j].

    Returns how many were kept. `forced` is uint8 [n], or [0] for none. NaN counts as largest. `bits` is memory for
    int32, n filled up to a multiple of 16.
    """
    n = h.shape[0]
    filled = (n + LANES - 1) // LANES * LANES
    scores = bits.view(np.float32)
    for j in range(n):
        scores[j] = abs(h[j] * norms[j])
    bits[n:] = -1
    at_bits = bits.ctypes.data
    # Sizes of floats compare as their bits do. As many as k are from `least` on, and fewer from `most` on.
    least, most, count = np.int64(0), np.int64(0x7FFFFFFF), n
    if k <= 0:
        least, count = most, 0
    while count != k and most - least > 1 and k > 0:
        middle = (least + most) >> 1
        above = count_from(at_bits, filled, np.int32(middle))
        if above >= k:
            least, count = middle, above
        else:
            most = middle
    surplus = count - k if count > k else 0
    bound = np.int32(least)
    if surplus == 0 and forced.shape[0] == 0:
        for j in range(n):
            h[j] = h[j] if bits[j] >= bound else np.float32(0)
        keep(bits)
        return count
    equal = count_from(at_bits, filled, bound) - count_from(at_bits, filled, np.int32(least + 1)) - surplus
    kept = 0
    for j in range(n):
        chosen = bits[j] > bound
        if bits[j] == bound and equal > 0:
            chosen = True
            equal -= 1
        if forced.shape[0]:
            chosen = chosen or forced[j] != 0
        if chosen:
            kept += 1
        else:
            h[j] = np.float32(0)
    keep(bits)
    return kept


@_compiled
def add_kept(neurons, first, last, group, codes, record, scales, halves, units, y):
    """Adds to y [units · 64] what the neurons of groups first ≤ g < last give that are not 0: addresses."""
    # What is kept of the groups that follow is asked for: the processor expects no rows that are skipped.
    starts = np.empty((_AHEAD + 1, MOST_OF_GROUP + 1), dtype=np.int64)
    counts, factors = np.empty(_AHEAD + 1, dtype=np.int64), np.empty(MOST_OF_GROUP + 2, dtype=np.int8)
    factors_at = factors.ctypes.data
    row_of_scales = units * 2 * UNIT * (2 if halves else 4)
    lines, lines_of_scales = (units * UNIT_BYTES + LINE - 1) // LINE, (row_of_scales + LINE - 1) // LINE
    h = carray(floats_at(neurons), (last * group,))
    asked = first
    for g in range(first, last):
        while asked < last and asked <= g + _AHEAD:
            own, n = starts[asked % (_AHEAD + 1)], 0
            for j in range(asked * group, (asked + 1) * group):
                # NaN is not 0.
                if h[j] != 0:
                    own[n] = j
                    n += 1
                    _ask(codes + j * record, lines)
            counts[asked % (_AHEAD + 1)] = n
            if n:
                _ask(scales + asked * row_of_scales, lines_of_scales)
            asked += 1
        slot = g % (_AHEAD + 1)
        own, n = starts[slot], counts[slot]
        if n == 0:
            continue
        largest, finite = np.float32(0), True
        for i in range(n):
            value = abs(h[own[i]])
            largest = max(largest, value)
            finite = finite and value < np.inf
        step, total = largest / _LARGEST, np.int64(0)
        # Smaller ones count as nothing, as records have it.
        counts_all = finite and largest >= _SMALLEST
        for i in range(n):
            q = np.int64(np.rint(h[own[i]] / step)) if counts_all else np.int64(0)
            factors[i] = q
            total += q
            own[i] = codes + own[i] * record
        if not counts_all:
            step = np.float32(0) if finite else np.float32(np.nan)
        if n % 2:
            own[n], factors[n] = own[n - 1], 0
        own_scales = scales + g * row_of_scales
        pairs, whole = (n + 1) // 2, step * np.float32(total)
        if halves:
            _add_pairs(True, starts[slot].ctypes.data, factors_at, pairs, own_scales, step, whole, y, units)
        else:
            _add_pairs(False, starts[slot].ctypes.data, factors_at, pairs, own_scales, step, whole, y, units)
    keep(starts)
    keep(factors)


@_compiled
def join_sums(parts, y):
    """Sets y [out] to the sum of parts [SUMS, out or more], in their order."""
    for o in range(y.shape[0]):
        y[o] = parts[0, o]
    for i in range(1, parts.shape[0]):
        for o in range(y.shape[0]):
            y[o] += parts[i, o]


@_compiled
def _sum_rows(neurons, records, scales, halves, group, y):
    groups, units = scales.shape[0], scales.shape[1]
    parts = np.empty((SUMS, units * UNIT), dtype=np.float32)
    for i in range(neurons.shape[0]):
        parts[:] = 0
        for p in range(SUMS):
            add_kept(
                neurons[i].ctypes.data, p * groups // SUMS, (p + 1) * groups // SUMS, group, records.ctypes.data,
                records.strides[0], scales.ctypes.data, halves, units, parts[p].ctypes.data,
            )  # fmt: skip
        join_sums(parts, y[i])
    keep(parts)
    keep(neurons)
    keep(records)
    keep(scales)
