"""The K formats of GGML: blocks of 256 weights, whose groups of 16 or 32 have scales of a few bits.

    Q2_K: 16 scales and lows of 4 bits, 64 bytes, d, dmin halves              w = d scale code - dmin low
    Q3_K: 32 bytes of third bits, 64 bytes, 16 scales of 6 bits, d            w = d (scale - 32) (code - 4)
    Q4_K: d, dmin, 8 scales and lows of 6 bits, 128 bytes                     w = d scale code - dmin low
    Q5_K: d, dmin, 8 scales and lows of 6 bits, 32 bytes of fifth bits, 128   w = d scale code - dmin low
    Q6_K: 128 bytes, 64 bytes of upper bits, 16 signed scales, d              w = d scale (code - 32)

Scales are made float32 once a block and kept in memory, from where a load fills all lanes of a register at no cost.
Codes of one byte belong to weights that are 32 apart, so that a vector of bytes has a vector of codes for each of some
units.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from patchclamp_server.cpu.formats.blocks import Block, Halves
from patchclamp_server.cpu.formats.lanes import (
    BYTES,
    I8,
    I32,
    INTS,
    Codebook,
    at,
    bits_of,
    float_of_half,
    halves_of_unit,
    integers,
    kept_splat,
    lowered,
    raised,
    scalar_at,
    scaled,
    splat_of_half,
    store_floats,
    unit_bytes,
    wide_bytes,
)
from patchclamp_server.cpu.vector import FLOATS, LANES, load, splat

# Where the lows are kept, behind the scales.
_LOWS = LANES
_HALVES = (0, LANES)


def keep_of_q2_k(b: Any, block: Any, kept: Any, halves: Any) -> None:
    both = wide_bytes(b, block)
    _keep(b, b.and_(both, integers(15)), at(b, block, 80), kept, halves)
    _keep(b, b.lshr(both, integers(4)), at(b, block, 82), at(b, kept, _LOWS), halves, negative=True)


def q2_k(b: Any, own: Block) -> Halves:
    block, kept = own.start, own.kept
    for i in range(2):
        packed = unit_bytes(b, at(b, block, 16 + 32 * i))
        for j in range(4):
            for g, codes in enumerate(halves_of_unit(b, bits_of(b, packed, 2 * j, 3)), 8 * i + 2 * j):
                yield scaled(b, codes, kept_splat(b, kept, g), kept_splat(b, kept, _LOWS + g))


def keep_of_q3_k(b: Any, block: Any, kept: Any, halves: Any) -> None:
    # Byte k of the first 8 has the low bits of scales k and k + 8; byte k of the others two upper bits of each fourth.
    words = [scalar_at(b, at(b, block, 96 + 4 * i), I32) for i in range(3)]
    nibble, pair_of_bits = I32(0x0F0F0F0F), I32(0x03030303)
    joined = [
        b.or_(
            b.and_(b.lshr(words[i % 2], I32(4 * (i // 2))), nibble),
            b.shl(b.and_(b.lshr(words[2], I32(2 * i)), pair_of_bits), I32(4)),
        )
        for i in range(4)
    ]
    _keep(b, b.sub(b.zext(_bytes_of(b, joined), INTS), integers(32)), at(b, block, 108), kept, halves)


def q3_k(b: Any, own: Block) -> Halves:
    block, kept = own.start, own.kept
    flags = unit_bytes(b, block)
    for i in range(2):
        packed = unit_bytes(b, at(b, block, 32 + 32 * i))
        for j in range(4):
            third = raised(b, bits_of(b, flags, 4 * i + j, 1), 2)
            unit = lowered(b, b.or_(bits_of(b, packed, 2 * j, 3), third), 4)
            for g, codes in enumerate(halves_of_unit(b, unit, signed=True), 8 * i + 2 * j):
                yield scaled(b, codes, kept_splat(b, kept, g), None)


def keep_of_q4_k(b: Any, block: Any, kept: Any, halves: Any) -> None:
    """Also of Q5_K: 8 scales and, behind LOWS, 8 lows."""
    words = [scalar_at(b, at(b, block, 4 + 4 * i), I32) for i in range(3)]
    six, four, two = I32(0x3F3F3F3F), I32(0x0F0F0F0F), I32(0x03030303)

    def upper(word: Any) -> Any:
        return b.shl(b.and_(b.lshr(word, I32(6)), two), I32(4))

    scales = [b.and_(words[0], six), b.or_(b.and_(words[2], four), upper(words[0]))]
    lows = [b.and_(words[1], six), b.or_(b.and_(b.lshr(words[2], I32(4)), four), upper(words[1]))]
    # One product has both, with the factor of either in its half of the lanes.
    factors = [float_of_half(b, halves, at(b, block, offset)) for offset in (0, 2)]
    scale, low = splat(b, factors[0]), b.fneg(splat(b, factors[1]))
    halves = ir.Constant(INTS, [*range(8), *range(LANES, LANES + 8)])
    products = b.fmul(b.sitofp(b.zext(_bytes_of(b, scales + lows), INTS), FLOATS), b.shuffle_vector(scale, low, halves))
    store_floats(b, products, kept)


_LOWS_OF_8 = 8


def q4_k(b: Any, own: Block) -> Halves:
    block, kept = own.start, own.kept
    for i in range(4):
        bytes_ = [wide_bytes(b, at(b, block, 16 + 32 * i + half)) for half in _HALVES]
        codes = Codebook(b, kept_splat(b, kept, 2 * i), kept_splat(b, kept, _LOWS_OF_8 + 2 * i))
        for wide in bytes_:
            yield codes.low_halves(wide)
        codes = Codebook(b, kept_splat(b, kept, 2 * i + 1), kept_splat(b, kept, _LOWS_OF_8 + 2 * i + 1))
        for wide in bytes_:
            yield codes.high_halves(wide)


def q5_k(b: Any, own: Block) -> Halves:
    block, kept = own.start, own.kept
    flags = unit_bytes(b, at(b, block, 16))
    for i in range(4):
        packed = unit_bytes(b, at(b, block, 48 + 32 * i))
        for j in range(2):
            unit = 2 * i + j
            fifth = raised(b, bits_of(b, flags, unit, 1), 4)
            for codes in halves_of_unit(b, b.or_(bits_of(b, packed, 4 * j, 15), fifth)):
                yield scaled(b, codes, kept_splat(b, kept, unit), kept_splat(b, kept, _LOWS_OF_8 + unit))


def keep_of_q6_k(b: Any, block: Any, kept: Any, halves: Any) -> None:
    _keep(b, b.sext(load(b, at(b, block, 192), BYTES), INTS), at(b, block, 208), kept, halves)


def q6_k(b: Any, own: Block) -> Halves:
    block, kept = own.start, own.kept
    for i in range(2):
        upper = unit_bytes(b, at(b, block, 128 + 32 * i))
        lower = [unit_bytes(b, at(b, block, 64 * i + 32 * j)) for j in range(2)]
        for j in range(4):
            two = raised(b, bits_of(b, upper, 2 * j, 3), 4)
            unit = lowered(b, b.or_(bits_of(b, lower[j % 2], 4 * (j // 2), 15), two), 32)
            for g, codes in enumerate(halves_of_unit(b, unit, signed=True), 8 * i + 2 * j):
                yield scaled(b, codes, kept_splat(b, kept, g), None)


def _keep(b: Any, codes: Any, factor: Any, kept: Any, halves: Any, *, negative: bool = False) -> None:
    """Keeps 16 codes times the half at `factor`."""
    products = b.fmul(b.sitofp(codes, FLOATS), splat_of_half(b, halves, factor))
    store_floats(b, b.fneg(products) if negative else products, kept)


def _bytes_of(b: Any, words: list[Any]) -> Any:
    """Returns four words of 32 bits as 16 bytes."""
    kind = ir.VectorType(I32, 4)
    vector = ir.Constant(kind, ir.Undefined)
    for i, word in enumerate(words):
        vector = b.insert_element(vector, word, I32(i))
    return b.bitcast(vector, ir.VectorType(I8, LANES))
