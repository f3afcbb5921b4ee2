"""The K formats of GGML: blocks of 256 weights, whose groups of 16 or 32 have scales of a few bits.

    Q2_K: 16 scales and lows of 4 bits, 64 bytes, d, dmin halves              w = d scale code - dmin low
    Q3_K: 32 bytes of third bits, 64 bytes, 16 scales of 6 bits, d            w = d (scale - 32) (code - 4)
    Q4_K: d, dmin, 8 scales and lows of 6 bits, 128 bytes                     w = d scale code - dmin low
    Q5_K: d, dmin, 8 scales and lows of 6 bits, 32 bytes of fifth bits, 128   w = d scale code - dmin low
    Q6_K: 128 bytes, 64 bytes of upper bits, 16 signed scales, d              w = d scale (code - 32)

Scales are made float32 once a block. Codes of one byte belong to weights that are 32 apart, so that a vector of bytes
has a vector of codes for each of some units.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from patchclamp_server.cpu.formats.blocks import Pair
from patchclamp_server.cpu.formats.lanes import (
    BYTES,
    I8,
    I32,
    INTS,
    LANES,
    Codebook,
    at,
    float_of_half,
    integers,
    scalar_at,
    scaled,
    wide_bytes,
)
from patchclamp_server.cpu.vector import FLOATS, load, splat

_HALVES = (0, LANES)


def q2_k(b: Any, block: Any) -> Iterator[Pair]:
    both = wide_bytes(b, block)
    scales = _times(b, b.and_(both, integers(15)), float_of_half(b, at(b, block, 80)))
    lows = _minus(b, _times(b, b.lshr(both, integers(4)), float_of_half(b, at(b, block, 82))))
    for i in range(2):
        bytes_ = [wide_bytes(b, at(b, block, 16 + 32 * i + half)) for half in _HALVES]
        for j in range(4):
            pair = [
                scaled(b, _bits(b, wide, 2 * j, 3), _lane(b, scales, g), _lane(b, lows, g))
                for g, wide in enumerate(bytes_, 8 * i + 2 * j)
            ]
            yield pair[0], pair[1]


def q3_k(b: Any, block: Any) -> Iterator[Pair]:
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
    codes = b.sub(b.zext(_bytes_of(b, joined), INTS), integers(32))
    scales = _times(b, codes, float_of_half(b, at(b, block, 108)))
    flags = [wide_bytes(b, at(b, block, half)) for half in _HALVES]
    for i in range(2):
        bytes_ = [wide_bytes(b, at(b, block, 32 + 32 * i + half)) for half in _HALVES]
        for j in range(4):
            pair = []
            for h, (wide, flag) in enumerate(zip(bytes_, flags, strict=True)):
                third = b.shl(_bits(b, flag, 4 * i + j, 1), integers(2))
                code = b.sub(b.or_(_bits(b, wide, 2 * j, 3), third), integers(4))
                pair.append(scaled(b, code, _lane(b, scales, 8 * i + 2 * j + h), None))
            yield pair[0], pair[1]


def q4_k(b: Any, block: Any) -> Iterator[Pair]:
    scales, lows = _six_bits(b, block)
    for i in range(4):
        bytes_ = [wide_bytes(b, at(b, block, 16 + 32 * i + half)) for half in _HALVES]
        codes = Codebook(b, _lane(b, scales, 2 * i), _lane(b, lows, 2 * i))
        yield codes.low_halves(bytes_[0]), codes.low_halves(bytes_[1])
        codes = Codebook(b, _lane(b, scales, 2 * i + 1), _lane(b, lows, 2 * i + 1))
        yield codes.high_halves(bytes_[0]), codes.high_halves(bytes_[1])


def q5_k(b: Any, block: Any) -> Iterator[Pair]:
    scales, lows = _six_bits(b, block)
    flags = [wide_bytes(b, at(b, block, 16 + half)) for half in _HALVES]
    for i in range(4):
        bytes_ = [wide_bytes(b, at(b, block, 48 + 32 * i + half)) for half in _HALVES]
        for j in range(2):
            unit = 2 * i + j
            pair = [
                scaled(
                    b,
                    b.or_(_bits(b, wide, 4 * j, 15), b.shl(_bits(b, flag, unit, 1), integers(4))),
                    _lane(b, scales, unit),
                    _lane(b, lows, unit),
                )
                for wide, flag in zip(bytes_, flags, strict=True)
            ]
            yield pair[0], pair[1]


def q6_k(b: Any, block: Any) -> Iterator[Pair]:
    signed = b.sext(load(b, at(b, block, 192), BYTES), INTS)
    scales = _times(b, signed, float_of_half(b, at(b, block, 208)))
    for i in range(2):
        upper = [wide_bytes(b, at(b, block, 128 + 32 * i + half)) for half in _HALVES]
        lower = [[wide_bytes(b, at(b, block, 64 * i + 32 * j + half)) for half in _HALVES] for j in range(2)]
        for j in range(4):
            pair = []
            for h in range(2):
                two = b.shl(_bits(b, upper[h], 2 * j, 3), integers(4))
                code = b.sub(b.or_(_bits(b, lower[j % 2][h], 4 * (j // 2), 15), two), integers(32))
                pair.append(scaled(b, code, _lane(b, scales, 8 * i + 2 * j + h), None))
            yield pair[0], pair[1]


def _six_bits(b: Any, block: Any) -> tuple[Any, Any]:
    """Returns the scales of the 8 units of Q4_K and Q5_K in lanes 0 to 7, and their lows, which are negative."""
    words = [scalar_at(b, at(b, block, 4 + 4 * i), I32) for i in range(3)]
    six, four, two = I32(0x3F3F3F3F), I32(0x0F0F0F0F), I32(0x03030303)

    def upper(word: Any) -> Any:
        return b.shl(b.and_(b.lshr(word, I32(6)), two), I32(4))

    scales = [b.and_(words[0], six), b.or_(b.and_(words[2], four), upper(words[0]))]
    lows = [b.and_(words[1], six), b.or_(b.and_(b.lshr(words[2], I32(4)), four), upper(words[1]))]
    wide = b.zext(_bytes_of(b, scales + lows), INTS)
    # Scales are lanes 0 to 7, lows the others.
    factors = [float_of_half(b, at(b, block, offset)) for offset in (0, 2)]
    return _times(b, wide, factors[0]), _minus(b, _times(b, _upper_lanes(b, wide), factors[1]))


def _upper_lanes(b: Any, wide: Any) -> Any:
    return b.shuffle_vector(wide, wide, ir.Constant(INTS, [*range(8, LANES), *range(8, LANES)]))


def _bytes_of(b: Any, words: list[Any]) -> Any:
    """Returns four words of 32 bits as 16 bytes."""
    kind = ir.VectorType(I32, 4)
    vector = ir.Constant(kind, ir.Undefined)
    for i, word in enumerate(words):
        vector = b.insert_element(vector, word, I32(i))
    return b.bitcast(vector, ir.VectorType(I8, LANES))


def _bits(b: Any, wide: Any, shift: int, mask: int) -> Any:
    return b.and_(b.lshr(wide, integers(shift)) if shift else wide, integers(mask))


def _times(b: Any, codes: Any, factor: Any) -> Any:
    return b.fmul(b.sitofp(codes, FLOATS), splat(b, factor))


def _minus(b: Any, values: Any) -> Any:
    return b.fneg(values)


def _lane(b: Any, values: Any, lane: int) -> Any:
    return b.shuffle_vector(values, values, integers(lane))
