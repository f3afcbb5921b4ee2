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
    I32,
    INTS,
    Codebook,
    at,
    bits_of,
    floats_of_halves,
    halves_of_unit,
    joined,
    keep_halves,
    kept_splat,
    lowered,
    scalar_at,
    scaled,
    wide_bytes,
)
from patchclamp_server.cpu.vector import FLOATS, LANES, UNIT, load, load_lanes

# What the generators give: 16 weights after 16 weights.
Halves = Iterator[Any]


def keep_scale(b: Any, blocks: list[Any], kept: Any) -> None:
    keep_halves(b, blocks, 1, kept)


def keep_scale_and_low(b: Any, blocks: list[Any], kept: Any) -> None:
    keep_halves(b, blocks, 2, kept)


def f32(b: Any, block: Any, _kept: Any) -> Halves:
    yield load(b, block, FLOATS)
    yield load(b, at(b, block, 4 * LANES), FLOATS)


def f16(b: Any, block: Any, _kept: Any) -> Halves:
    yield floats_of_halves(b, block)
    yield floats_of_halves(b, at(b, block, 2 * LANES))


def bf16(b: Any, block: Any, _kept: Any) -> Halves:
    yield load_lanes(b, block, types.uint16)
    yield load_lanes(b, at(b, block, 2 * LANES), types.uint16)


def q4_0(b: Any, block: Any, kept: Any) -> Halves:
    codes, wide = Codebook(b, kept_splat(b, kept, 0), None, -8), wide_bytes(b, at(b, block, 2))
    yield codes.low_halves(wide)
    yield codes.high_halves(wide)


def q4_1(b: Any, block: Any, kept: Any) -> Halves:
    codes = Codebook(b, kept_splat(b, kept, 0), kept_splat(b, kept, 1))
    wide = wide_bytes(b, at(b, block, 4))
    yield codes.low_halves(wide)
    yield codes.high_halves(wide)


def q5_0(b: Any, block: Any, kept: Any) -> Halves:
    bits, codes = _fifth_bits_and_codes(b, at(b, block, 2))
    for own in halves_of_unit(b, b.select(bits, codes, lowered(b, codes, 16)), signed=True):
        yield scaled(b, own, kept_splat(b, kept, 0), None)


def q5_1(b: Any, block: Any, kept: Any) -> Halves:
    bits, codes = _fifth_bits_and_codes(b, at(b, block, 4))
    # No code has 16 yet.
    for own in halves_of_unit(b, b.select(bits, lowered(b, codes, -16), codes)):
        yield scaled(b, own, kept_splat(b, kept, 0), kept_splat(b, kept, 1))


def q8_0(b: Any, block: Any, kept: Any) -> Halves:
    for offset in (2, 2 + LANES):
        yield scaled(b, b.sext(load(b, at(b, block, offset), BYTES), INTS), kept_splat(b, kept, 0), None)


def _fifth_bits_and_codes(b: Any, pointer: Any) -> tuple[Any, Any]:
    flags = b.bitcast(scalar_at(b, pointer, I32), ir.VectorType(ir.IntType(1), UNIT))
    packed = load(b, at(b, pointer, 4), BYTES)
    return flags, joined(b, bits_of(b, packed, 0, 15), bits_of(b, packed, 4, 15))
