"""Words of 32 bits from 16 rows of weights, one row a lane."""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from dataclasses import dataclass
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from patchclamp_server.cpu.formats.lanes import I32, INTS, at, floats_of_half_bits, integers
from patchclamp_server.cpu.vector import FLOATS, LANES, load

_QUARTER = ir.VectorType(I32, 4)
# What the instructions vpunpck{l,h}dq and vpunpck{l,h}qdq do in each quarter of a vector.
_LOW_WORDS, _HIGH_WORDS, _LOW_PAIRS, _HIGH_PAIRS = (0, 16, 1, 17), (2, 18, 3, 19), (0, 1, 16, 17), (2, 3, 18, 19)


@dataclass(frozen=True)
class Run:
    """Codes of 16 or 32 weights of 16 rows from a place in the row on: vectors of 4 bytes of each row."""

    place: int
    codes: list[Any]
    scale: Any
    low: Any = None


def columns(b: Any, rows: list[Any], offset: int) -> list[Any]:
    """Returns the 4 words at an offset of each row."""
    own = [load(b, at(b, row, offset), _QUARTER) for row in rows]
    joined = [_joined(b, [_joined(b, own[k : k + 8 : 4]), _joined(b, own[k + 8 : k + 16 : 4])]) for k in range(4)]
    (low, high), (low_2, high_2) = (
        [_in_quarters(b, x, y, lanes) for lanes in (_LOW_WORDS, _HIGH_WORDS)] for x, y in (joined[:2], joined[2:])
    )
    return [
        _in_quarters(b, x, y, lanes) for x, y in ((low, low_2), (high, high_2)) for lanes in (_LOW_PAIRS, _HIGH_PAIRS)
    ]


def _joined(b: Any, vectors: list[Any]) -> Any:
    n = 2 * vectors[0].type.count
    return b.shuffle_vector(*vectors, ir.Constant(ir.VectorType(I32, n), list(range(n))))


def _in_quarters(b: Any, x: Any, y: Any, lanes: tuple[int, ...]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(INTS, [start + lane for start in range(0, LANES, 4) for lane in lanes]))


def half(b: Any, words: Any, which: int) -> Any:
    """Returns the lower or the upper 16 bits of words as float32."""
    return floats_of_half_bits(b, b.lshr(words, integers(16)) if which else b.and_(words, integers(0xFFFF)))


def byte_of(b: Any, words: Any, i: int, *, signed: bool = False) -> Any:
    """Returns byte i of words as float32."""
    if signed:
        return b.sitofp(b.ashr(b.shl(words, integers(24 - 8 * i)), integers(24)), FLOATS)
    return b.sitofp(b.and_(b.lshr(words, integers(8 * i)), integers(255)), FLOATS)


def bits(b: Any, words: Any, shift: int, mask: int) -> Any:
    """Returns (byte >> shift) & mask for the 4 bytes of words."""
    return b.and_(b.lshr(words, integers(shift)) if shift else words, every_byte(mask))


def placed(b: Any, words: Any, shift: int, mask: int, to: int) -> Any:
    """Returns ((byte >> shift) & mask) << to."""
    return b.shl(bits(b, words, shift, mask), integers(to)) if to else bits(b, words, shift, mask)


def every_byte(value: int) -> Any:
    return integers(value * 0x01010101)
