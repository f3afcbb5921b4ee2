"""Formats whose steps are 32 weights: rows of float32, float16 and bfloat16, and blocks of 32 codes.

    Q4_0: d half, 16 bytes                      w = d (code - 8)
    Q4_1: d, m halves, 16 bytes                 w = d code + m
    Q5_0: d half, 32 fifth bits, 16 bytes       w = d (code - 16)
    Q5_1: d, m halves, 32 fifth bits, 16 bytes  w = d code + m
    Q8_0: d half, 32 signed bytes               w = d code

Byte k has code k in its low and code k + 16 in its high half.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from patchclamp_server.cpu.formats.lanes import (
    BYTES,
    I16,
    INTS,
    Codebook,
    at,
    floats_of_halves,
    integers,
    nibbles,
    scalar_at,
    scaled,
    splat_half,
    wide_bytes,
)
from patchclamp_server.cpu.vector import FLOATS, LANES, load, load_lanes

# What a generator gives for 32 weights: the first 16, and the others.
Pair = tuple[Any, Any]


def f32(b: Any, block: Any) -> Iterator[Pair]:
    yield load(b, block, FLOATS), load(b, at(b, block, 4 * LANES), FLOATS)


def f16(b: Any, block: Any) -> Iterator[Pair]:
    yield floats_of_halves(b, block), floats_of_halves(b, at(b, block, 2 * LANES))


def bf16(b: Any, block: Any) -> Iterator[Pair]:
    yield load_lanes(b, block, types.uint16), load_lanes(b, at(b, block, 2 * LANES), types.uint16)


def q4_0(b: Any, block: Any) -> Iterator[Pair]:
    codes, wide = Codebook(b, splat_half(b, block), None, -8), wide_bytes(b, at(b, block, 2))
    yield codes.low_halves(wide), codes.high_halves(wide)


def q4_1(b: Any, block: Any) -> Iterator[Pair]:
    codes = Codebook(b, splat_half(b, block), splat_half(b, at(b, block, 2)))
    wide = wide_bytes(b, at(b, block, 4))
    yield codes.low_halves(wide), codes.high_halves(wide)


def q5_0(b: Any, block: Any) -> Iterator[Pair]:
    scale = splat_half(b, block)
    low, high = (
        b.select(bits, codes, b.sub(codes, integers(16)))
        for bits, codes in zip(_fifth_bits(b, at(b, block, 2)), nibbles(b, wide_bytes(b, at(b, block, 6))), strict=True)
    )
    yield scaled(b, low, scale, None), scaled(b, high, scale, None)


def q5_1(b: Any, block: Any) -> Iterator[Pair]:
    scale, least = splat_half(b, block), splat_half(b, at(b, block, 2))
    low, high = (
        b.select(bits, b.or_(codes, integers(16)), codes)
        for bits, codes in zip(_fifth_bits(b, at(b, block, 4)), nibbles(b, wide_bytes(b, at(b, block, 8))), strict=True)
    )
    yield scaled(b, low, scale, least), scaled(b, high, scale, least)


def q8_0(b: Any, block: Any) -> Iterator[Pair]:
    scale = splat_half(b, block)
    low, high = (b.sext(load(b, at(b, block, offset), BYTES), INTS) for offset in (2, 2 + LANES))
    yield scaled(b, low, scale, None), scaled(b, high, scale, None)


def _fifth_bits(b: Any, pointer: Any) -> Pair:
    flags = ir.VectorType(ir.IntType(1), LANES)
    low, high = (b.bitcast(scalar_at(b, at(b, pointer, offset), I16), flags) for offset in (0, 2))
    return low, high
