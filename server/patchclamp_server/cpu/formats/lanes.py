"""What the formats share: vectors of 16 lanes from bytes and halves, and what the processor has for them."""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from functools import cache
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
from llvmlite import ir
from numba.core import cgutils

from patchclamp_server.cpu.invariant.tiles import fma
from patchclamp_server.cpu.vector import FLOATS, LANES, UNIT, load, splat

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES = ir.VectorType(I8, LANES)
UNIT_BYTES = ir.VectorType(I8, UNIT)
INTS = ir.VectorType(I32, LANES)
_HALF = ir.HalfType()


@cache
def host_has(feature: str) -> bool:
    """Returns whether numba compiles for a processor with an LLVM feature, such as avx512f."""
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


def has_half_conversion() -> bool:
    # Others than x86 (arm64) have it without a feature.
    return host_has("f16c") or not llvmlite.binding.get_default_triple().startswith(("x86", "i686"))


def at(b: Any, pointer: Any, offset: int) -> Any:
    return b.gep(pointer, [I64(offset)]) if offset else pointer


def integers(value: int) -> Any:
    return ir.Constant(INTS, [value] * LANES)


def wide_bytes(b: Any, pointer: Any) -> Any:
    """Returns 16 unsigned bytes as int32."""
    return b.zext(load(b, pointer, BYTES), INTS)


def scalar_at(b: Any, pointer: Any, kind: Any) -> Any:
    value = b.load(b.bitcast(pointer, kind.as_pointer()))
    value.align = 1
    return value


def float_of_half(b: Any, halves: Any, pointer: Any) -> Any:
    """Returns the float32 of a half, which may lie at any address, from the table (halves.py) at `halves`."""
    return b.load(b.gep(halves, [b.zext(scalar_at(b, pointer, I16), I64)]))


def splat_of_half(b: Any, halves: Any, pointer: Any) -> Any:
    return splat(b, float_of_half(b, halves, pointer))


def floats_of_halves(b: Any, pointer: Any) -> Any:
    """Returns 16 halves as float32."""
    if has_half_conversion():
        value = b.load(b.bitcast(pointer, ir.VectorType(_HALF, LANES).as_pointer()))
        value.align = 1
        return b.fpext(value, FLOATS)
    value = b.load(b.bitcast(pointer, ir.VectorType(I16, LANES).as_pointer()))
    value.align = 1
    return _widen(b, b.zext(value, INTS), INTS, FLOATS)


def floats_of_half_bits(b: Any, bits: Any) -> Any:
    """Returns the float32 of 16 halves whose bits are in int32."""
    if not has_half_conversion():
        return _widen(b, bits, INTS, FLOATS)
    return b.fpext(b.bitcast(b.trunc(bits, ir.VectorType(I16, LANES)), ir.VectorType(_HALF, LANES)), FLOATS)


def _widen(b: Any, bits: Any, integer: Any, result: Any) -> Any:
    """Returns float32 of halves by integers: a product with 2^112 sets the exponent and makes subnormal ones normal."""

    def constant(value: Any, kind: Any) -> Any:
        return ir.Constant(kind, [value] * LANES)

    size = constant(0x7FFF, integer)
    magnitude = b.shl(b.and_(bits, size), constant(13, integer))
    finite = b.bitcast(b.fmul(b.bitcast(magnitude, result), constant(2.0**112, result)), integer)
    special = b.or_(magnitude, constant(0x7F800000, integer))
    is_special = b.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13, integer))
    sign = b.shl(b.and_(bits, constant(0x8000, integer)), constant(16, integer))
    return b.bitcast(b.or_(sign, b.select(is_special, special, finite)), result)


def scaled(b: Any, codes: Any, scale: Any, low: Any) -> Any:
    """Returns codes · scale + low for vectors of int32 and float32; `low` may be None."""
    values = b.sitofp(codes, FLOATS)
    return b.fmul(values, scale) if low is None else fma(b, values, scale, low)


# Codes of a unit are put together as 32 bytes, which take a quarter of the registers of integers.


def unit_bytes(b: Any, pointer: Any) -> Any:
    return load(b, pointer, UNIT_BYTES)


def bits_of(b: Any, values: Any, shift: int, mask: int) -> Any:
    """Returns (byte >> shift) & mask."""
    kind = values.type

    def constant(value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    return b.and_(b.lshr(values, constant(shift)) if shift else values, constant(mask))


def raised(b: Any, values: Any, shift: int) -> Any:
    """Returns byte << shift."""
    return b.shl(values, ir.Constant(values.type, [shift] * values.type.count))


def lowered(b: Any, values: Any, by: int) -> Any:
    """Returns byte - by, signed."""
    return b.sub(values, ir.Constant(values.type, [by] * values.type.count))


def joined(b: Any, low: Any, high: Any) -> Any:
    """Returns 16 bytes and 16 bytes as 32."""
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, UNIT), list(range(UNIT))))


def halves_of_unit(b: Any, codes: Any, *, signed: bool = False) -> list[Any]:
    """Returns the first and the last 16 of 32 bytes as int32."""
    halves = [b.shuffle_vector(codes, codes, ir.Constant(INTS, list(range(k, k + LANES)))) for k in (0, LANES)]
    return [b.sext(half, INTS) if signed else b.zext(half, INTS) for half in halves]


class Codebook:
    """The 16 values of a code of 4 bits, code · scale + low, in one register where the processor can look up there, or
    the 32 of a code of 5 bits in two."""

    def __init__(self, b: Any, scale: Any, low: Any, first: int = 0, *, bits: int = 4) -> None:
        """Code c stands for c + first."""
        self.b, self.scale, self.low, self.first = b, scale, low, first
        self.tables: list[Any] = []
        if host_has("avx512f"):
            starts = range(first, first + (1 << bits), LANES)
            codes = [ir.Constant(INTS, list(range(start, start + LANES))) for start in starts]
            self.tables = [scaled(b, own, scale, low) for own in codes]

    def low_halves(self, wide: Any) -> Any:
        """Returns the values of the low halves of bytes."""
        # A look-up of 16 does not see higher bits.
        return self.values(wide if self.tables else self.b.and_(wide, integers(15)))

    def high_halves(self, wide: Any) -> Any:
        return self.values(self.b.lshr(wide, integers(4)))

    def values(self, codes: Any) -> Any:
        if not self.tables:
            shifted = self.b.add(codes, integers(self.first)) if self.first else codes
            return scaled(self.b, shifted, self.scale, self.low)
        one = len(self.tables) == 1
        name = "permvar.sf.512" if one else "vpermi2var.ps.512"
        operands = [self.tables[0], codes] if one else [self.tables[0], codes, self.tables[1]]
        kind = ir.FunctionType(FLOATS, [operand.type for operand in operands])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.x86.avx512.{name}"), operands)


def store_floats(b: Any, vector: Any, pointer: Any) -> None:
    b.store(vector, b.bitcast(pointer, vector.type.as_pointer())).align = 4


def kept_splat(b: Any, kept: Any, i: int) -> Any:
    """Returns 16 times float32 number i at `kept`."""
    return splat(b, b.load(at(b, kept, i)))
