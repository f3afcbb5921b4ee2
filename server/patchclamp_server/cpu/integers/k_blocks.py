"""Codes of blocks of 256 (formats/k_blocks.py says how they lie) as bytes of 16 rows."""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from typing import Any

from patchclamp_server.cpu.integers.columns import Run, bits, byte_of, columns, half, placed
from patchclamp_server.cpu.vector import FLOATS

_FOUR = range(4)


def q2_k(b: Any, rows: list[Any]) -> Iterator[Run]:
    head, factors = columns(b, rows, 0), columns(b, rows, 68)[3]
    d, low = half(b, factors, 0), b.fneg(half(b, factors, 1))
    scales, lows = ([bits(b, word, shift, 15) for word in head] for shift in (0, 4))
    for i, h in _PARTS:
        packed = columns(b, rows, 16 + 32 * i + 16 * h)
        for j in _FOUR:
            g = 8 * i + 2 * j + h
            yield Run(
                16 * g,
                [bits(b, word, 2 * j, 3) for word in packed],
                b.fmul(byte_of(b, scales[g // 4], g % 4), d),
                b.fmul(byte_of(b, lows[g // 4], g % 4), low),
            )


def q3_k(b: Any, rows: list[Any]) -> Iterator[Run]:
    words = columns(b, rows, 92)[1:]
    d = half(b, columns(b, rows, 94)[3], 1)
    scales = [b.or_(bits(b, words[i % 2], 4 * (i // 2), 15), placed(b, words[2], 2 * i, 3, 4)) for i in _FOUR]
    for i, h in _PARTS:
        flags, packed = columns(b, rows, 16 * h), columns(b, rows, 32 + 32 * i + 16 * h)
        for j in _FOUR:
            g = 8 * i + 2 * j + h
            scale = b.fsub(byte_of(b, scales[g // 4], g % 4), _floats(32))
            pairs = zip(packed, flags, strict=True)
            codes = [b.or_(bits(b, word, 2 * j, 3), placed(b, own, 4 * i + j, 1, 2)) for word, own in pairs]
            yield Run(16 * g, codes, b.fmul(scale, d))


def q4_k(b: Any, rows: list[Any]) -> Iterator[Run]:
    groups = _scales_and_lows(b, rows)
    for i in _FOUR:
        packed = [word for h in range(2) for word in columns(b, rows, 16 + 32 * i + 16 * h)]
        for j in range(2):
            yield Run(64 * i + 32 * j, [bits(b, word, 4 * j, 15) for word in packed], *next(groups))


def q5_k(b: Any, rows: list[Any]) -> Iterator[Run]:
    groups = _scales_and_lows(b, rows)
    flags = [word for h in range(2) for word in columns(b, rows, 16 + 16 * h)]
    for i in _FOUR:
        packed = [word for h in range(2) for word in columns(b, rows, 48 + 32 * i + 16 * h)]
        for j in range(2):
            pairs = zip(packed, flags, strict=True)
            codes = [b.or_(bits(b, word, 4 * j, 15), placed(b, own, 2 * i + j, 1, 4)) for word, own in pairs]
            yield Run(64 * i + 32 * j, codes, *next(groups))


def q6_k(b: Any, rows: list[Any]) -> Iterator[Run]:
    scales, d = columns(b, rows, 192), half(b, columns(b, rows, 194)[3], 1)
    for i, h in _PARTS:
        upper = columns(b, rows, 128 + 32 * i + 16 * h)
        lower = [columns(b, rows, 64 * i + 32 * j + 16 * h) for j in range(2)]
        for j in _FOUR:
            g = 8 * i + 2 * j + h
            pairs = zip(lower[j % 2], upper, strict=True)
            codes = [b.or_(bits(b, word, 4 * (j // 2), 15), placed(b, own, 2 * j, 3, 4)) for word, own in pairs]
            yield Run(16 * g, codes, b.fmul(byte_of(b, scales[g // 4], g % 4, signed=True), d))


# Halves of a block, and those of the groups of 32 in them: 16 bytes have codes of four groups.
_PARTS = [(i, h) for i in range(2) for h in range(2)]
PLACES_OF_16 = tuple(128 * i + 32 * j + 16 * h for i, h in _PARTS for j in _FOUR)


def _scales_and_lows(b: Any, rows: list[Any]) -> Iterator[tuple[Any, Any]]:
    head, *words = columns(b, rows, 0)
    d, low = half(b, head, 0), b.fneg(half(b, head, 1))
    scales = [bits(b, words[0], 0, 63), b.or_(bits(b, words[2], 0, 15), placed(b, words[0], 6, 3, 4))]
    lows = [bits(b, words[1], 0, 63), b.or_(bits(b, words[2], 4, 15), placed(b, words[1], 6, 3, 4))]
    for g in range(8):
        own, offset = byte_of(b, scales[g // 4], g % 4), byte_of(b, lows[g // 4], g % 4)
        yield b.fmul(own, d), b.fmul(offset, low)


def _floats(value: float) -> Any:
    return FLOATS([value] * FLOATS.count)
