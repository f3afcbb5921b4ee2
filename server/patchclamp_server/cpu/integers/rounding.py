"""Rows of activations in 8 bits: records of 32 inputs.

    q    32 signed bytes, -127 to 127
    s    float32
    -Σq  int32 of the first 16, of the last 16 and of all
    sΣq  float32 of the same

A group that has an infinite number or NaN has s = NaN and so makes every output of its row NaN. One whose s is no
normal number, so that all its inputs are below 1.5e-36, is 0.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.formats.lanes import BYTES, I32, I64, INTS, at, integers
from patchclamp_server.cpu.vector import FLOATS, LANES, UNIT, load, splat

# Bytes of a record, and the places of its fields.
RECORD = 64
SCALE, SUMS, SCALED_SUMS = 32, 36, 48
FIRST_16, LAST_16, ALL = range(3)
_LARGEST = 127
_FLOAT = ir.FloatType()
# The bits of float32: infinity, and 127 times the smallest normal number.
_INFINITE, _SMALLEST = 0x7F800000, 0x03FE0000
# A float32 of this size has no bits below 1: a sum with it rounds to nearest, ties to even.
_ROUND = 1.5 * 2**23
_ROUND_BITS = 0x4B400000


@intrinsic
def round_groups(_context, x, groups, target):  # type: ignore[no-untyped-def]
    """Writes records of `groups` groups of float32 at address x to address `target`."""
    signature = types.void(*[types.int64] * 3)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, target = b.inttoptr(args[0], _FLOAT.as_pointer()), b.inttoptr(args[2], ir.IntType(8).as_pointer())
        with cgutils.for_range(b, args[1]) as loop:
            source = b.gep(x, [b.mul(loop.index, I64(UNIT))])
            _round(b, source, b.gep(target, [b.mul(loop.index, I64(RECORD))]))
        return context.get_dummy_value()

    return signature, generate


def _round(b: Any, source: Any, record: Any) -> None:
    halves = [load(b, at(b, source, offset), FLOATS) for offset in (0, LANES)]
    # As integers, sizes compare as floats do, and NaN is above infinity.
    sizes = [b.and_(b.bitcast(half, INTS), integers(0x7FFFFFFF)) for half in halves]
    most = _of_lanes(b, _larger(b, *sizes), _larger)
    finite = b.icmp_signed("<", most, I32(_INFINITE))
    counts = b.and_(finite, b.icmp_signed(">=", most, I32(_SMALLEST)))
    scale = b.fdiv(b.bitcast(most, _FLOAT), _FLOAT(_LARGEST))
    divisor = splat(b, b.select(counts, scale, _FLOAT(1)))
    kept = splat(b, b.select(counts, I32(-1), I32(0)))
    sums = []
    for half, offset in zip(halves, (0, LANES), strict=True):
        value = b.bitcast(b.and_(b.bitcast(half, INTS), kept), FLOATS)
        rounded = b.fadd(b.fdiv(value, divisor), ir.Constant(FLOATS, [_ROUND] * LANES))
        q = b.sub(b.bitcast(rounded, INTS), integers(_ROUND_BITS))
        _store(b, b.trunc(q, BYTES), at(b, record, offset))
        sums.append(_of_lanes(b, q, lambda b, x, y: b.add(x, y)))
    sums.append(b.add(*sums))
    own = b.select(counts, scale, b.select(finite, _FLOAT(0), _FLOAT(float("nan"))))
    _store(b, own, at(b, record, SCALE))
    for i, total in enumerate(sums):
        _store(b, b.neg(total), at(b, record, SUMS + 4 * i))
        _store(b, b.fmul(own, b.sitofp(total, _FLOAT)), at(b, record, SCALED_SUMS + 4 * i))


def _larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


def _of_lanes(b: Any, vector: Any, join: Any) -> Any:
    n = LANES
    while n > 1:
        n //= 2
        parts = [
            b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, n), list(range(start, start + n))))
            for start in (0, n)
        ]
        vector = join(b, *parts)
    return b.extract_element(vector, I32(0))


def _store(b: Any, value: Any, pointer: Any) -> None:
    b.store(value, b.bitcast(pointer, value.type.as_pointer())).align = 1
