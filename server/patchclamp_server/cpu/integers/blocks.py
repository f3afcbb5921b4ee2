"""Codes of blocks of 32 (formats/blocks.py says how they lie) as bytes of 16 rows."""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from typing import Any

from patchclamp_server.cpu.formats.lanes import integers
from patchclamp_server.cpu.integers.columns import Run, bits, columns, every_byte, half


def q4_0(b: Any, rows: list[Any]) -> Iterator[Run]:
    yield Run(0, _nibbles(b, columns(b, rows, 2)), half(b, columns(b, rows, 0)[0], 0))


def q4_1(b: Any, rows: list[Any]) -> Iterator[Run]:
    head = columns(b, rows, 0)[0]
    yield Run(0, _nibbles(b, columns(b, rows, 4)), half(b, head, 0), half(b, head, 1))


def q5_0(b: Any, rows: list[Any]) -> Iterator[Run]:
    head = columns(b, rows, 0)
    flags = b.or_(b.lshr(head[0], integers(16)), b.shl(head[1], integers(16)))
    yield Run(0, _with_fifth_bits(b, columns(b, rows, 6), flags), half(b, head[0], 0))


def q5_1(b: Any, rows: list[Any]) -> Iterator[Run]:
    head = columns(b, rows, 0)
    yield Run(0, _with_fifth_bits(b, columns(b, rows, 8), head[1]), half(b, head[0], 0), half(b, head[0], 1))


def q8_0(b: Any, rows: list[Any]) -> Iterator[Run]:
    words = columns(b, rows, 2) + columns(b, rows, 18)
    # c + 128 as an unsigned byte.
    yield Run(0, [b.xor(word, every_byte(128)) for word in words], half(b, columns(b, rows, 0)[0], 0))


def _nibbles(b: Any, words: list[Any]) -> list[Any]:
    return [bits(b, word, shift, 15) for shift in (0, 4) for word in words]


def _with_fifth_bits(b: Any, words: list[Any], flags: Any) -> list[Any]:
    codes = []
    for i, nibbles in enumerate(_nibbles(b, words)):
        four = b.and_(b.lshr(flags, integers(4 * i)), integers(15))
        # The product has bit j of the four at bit 4 of byte j.
        codes.append(b.or_(nibbles, b.and_(b.mul(four, integers(0x02040810)), every_byte(16))))
    return codes
