"""Codes and scales of stored rows, w = scale · code + low, for a copy of a matrix in another order.

Codes of 4 bits have lows; codes of more bits are signed bytes and have none. Formats whose codes need both (Q5_1, Q5_K)
and those of numbers are not codes here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.stored import Format, Part

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Codes:
    """codes [out, in], uint8 or int8; scales [out, groups] of `group` inputs; lows as scales, or None."""

    codes: NDArray[np.uint8] | NDArray[np.int8]
    scales: Floats
    lows: Floats | None
    group: int


def codes_of(part: Part) -> Codes | None:
    """Returns the codes of a part, or None where its format has none."""
    function = _CODES.get(part.format)
    if function is None:
        return None
    n, size = len(part.starts), part.format.row_bytes(part.width)
    blocks = part.memory[part.starts[:, None] + np.arange(size)].reshape(n, -1, part.format.size)
    codes, scales, lows = function(blocks)
    shape = (n, -1)
    scales = np.ascontiguousarray(scales, dtype=np.float32).reshape(shape)
    lows = None if lows is None else np.ascontiguousarray(lows, dtype=np.float32).reshape(shape)
    return Codes(codes.reshape(n, part.width), scales, lows, part.width // scales.shape[1])


# Of blocks [rows, blocks, bytes] these return codes, scales and lows, whose last two dimensions are blocks and what is
# in one.
_Fields = tuple[NDArray[np.uint8] | NDArray[np.int8], Floats, Floats | None]


def _halves(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _q4_0(blocks: Bytes) -> _Fields:
    scale = _halves(blocks, 0)
    return _nibbles(blocks[..., 2:]), scale, scale * np.float32(-8)


def _q4_1(blocks: Bytes) -> _Fields:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> _Fields:
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    codes = (_nibbles(blocks[..., 6:]) | fifth << 4).astype(np.int8) - np.int8(16)
    return codes, _halves(blocks, 0), None


def _q8_0(blocks: Bytes) -> _Fields:
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _halves(blocks, 0), None


def _fields(packed: Bytes, groups: int, shifts: range, mask: int) -> Bytes:
    """Returns the codes of `shifts` of groups of bytes: those of the first shift of a group, then the second's."""
    wide = packed.reshape(*packed.shape[:2], groups, 1, -1)
    own = wide >> np.array(shifts, dtype=np.uint8)[:, None] & np.uint8(mask)
    return own.reshape(*packed.shape[:2], -1)


def _q2_k(blocks: Bytes) -> _Fields:
    scales = blocks[..., :16]
    lows = -(_halves(blocks, 82) * (scales >> 4))
    return _fields(blocks[..., 16:80], 2, range(0, 8, 2), 3), _halves(blocks, 80) * (scales & 15), lows


def _q3_k(blocks: Bytes) -> _Fields:
    thirds = _fields(blocks[..., :32], 1, range(8), 1)
    codes = _fields(blocks[..., 32:96], 2, range(0, 8, 2), 3) | thirds << 2
    lower = _fields(blocks[..., 96:104], 1, range(0, 8, 4), 15)
    upper = _fields(blocks[..., 104:108], 1, range(0, 8, 2), 3)
    scale = _halves(blocks, 108) * ((lower | upper << 4).astype(np.float32) - 32)
    return codes, scale, scale * np.float32(-4)


def _q4_k(blocks: Bytes) -> _Fields:
    first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate((first & 63, third & 15 | first >> 2 & 48), axis=-1)
    lows = np.concatenate((second & 63, third >> 4 | second >> 2 & 48), axis=-1)
    codes = _fields(blocks[..., 16:], 4, range(0, 8, 4), 15)
    return codes, _halves(blocks, 0) * scales, -(_halves(blocks, 2) * lows)


def _q6_k(blocks: Bytes) -> _Fields:
    lower = _fields(blocks[..., :128], 2, range(0, 8, 4), 15)
    upper = _fields(blocks[..., 128:192], 2, range(0, 8, 2), 3)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return (lower | upper << 4).astype(np.int8) - np.int8(32), _halves(blocks, 208) * scales, None


_CODES: dict[Format, Callable[[Bytes], _Fields]] = {
    Format.Q4_0: _q4_0,
    Format.Q4_1: _q4_1,
    Format.Q5_0: _q5_0,
    Format.Q8_0: _q8_0,
    Format.Q2_K: _q2_k,
    Format.Q3_K: _q3_k,
    Format.Q4_K: _q4_k,
    Format.Q6_K: _q6_k,
}
