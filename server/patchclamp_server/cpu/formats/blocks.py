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
from typing import Any, NamedTuple

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
    scalar_at,
    scaled,
    splat_of_half,
    wide_bytes,
)
from patchclamp_server.cpu.vector import FLOATS, LANES, load, load_lanes

# What the generators give: 16 weights after 16 weights.
Halves = Iterator[Any]


class Block(NamedTuple):
    """Pointers to a block, to what is kept of it where something is (table.py), and to the table of halves."""

    start: Any
    kept: Any
    halves: Any

    def at(self, b: Any, offset: int) -> Any:
        return at(b, self.start, offset)

    def splat(self, b: Any, offset: int) -> Any:
        """Returns 16 times the half at a byte of it, as float32."""
        return splat_of_half(b, self.halves, self.at(b, offset))


def f32(b: Any, block: Block) -> Halves:
    yield load(b, block.start, FLOATS)
    yield load(b, block.at(b, 4 * LANES), FLOATS)


def f16(b: Any, block: Block) -> Halves:
    yield floats_of_halves(b, block.start)
    yield floats_of_halves(b, block.at(b, 2 * LANES))


def bf16(b: Any, block: Block) -> Halves:
    yield load_lanes(b, block.start, types.uint16)
    yield load_lanes(b, block.at(b, 2 * LANES), types.uint16)


def q4_0(b: Any, block: Block) -> Halves:
    codes, wide = Codebook(b, block.splat(b, 0), None, -8), wide_bytes(b, block.at(b, 2))
    yield codes.low_halves(wide)
    yield codes.high_halves(wide)


def q4_1(b: Any, block: Block) -> Halves:
    codes = Codebook(b, block.splat(b, 0), block.splat(b, 2))
    wide = wide_bytes(b, block.at(b, 4))
    yield codes.low_halves(wide)
    yield codes.high_halves(wide)


def q5_0(b: Any, block: Block) -> Halves:
    codes = Codebook(b, block.splat(b, 0), None, -16, bits=5)
    yield from _of_five_bits(b, codes, block.at(b, 2))


def q5_1(b: Any, block: Block) -> Halves:
    codes = Codebook(b, block.splat(b, 0), block.splat(b, 2), bits=5)
    yield from _of_five_bits(b, codes, block.at(b, 4))


def q8_0(b: Any, block: Block) -> Halves:
    scale = block.splat(b, 0)
    for offset in (2, 2 + LANES):
        yield scaled(b, b.sext(load(b, block.at(b, offset), BYTES), INTS), scale, None)


def _of_five_bits(b: Any, codes: Codebook, pointer: Any) -> Halves:
    """Returns the values of codes whose fifth bits lie at a pointer, in front of the others."""
    wide = wide_bytes(b, at(b, pointer, 4))
    for half, four in enumerate((b.and_(wide, integers(15)), b.lshr(wide, integers(4)))):
        fifth = b.bitcast(scalar_at(b, at(b, pointer, 2 * half), I16), ir.VectorType(ir.IntType(1), LANES))
        yield codes.values(b.select(fifth, b.or_(four, integers(16)), four))
