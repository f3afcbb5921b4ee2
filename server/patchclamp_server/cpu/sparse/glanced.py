"""Products with 4-bit codes and rows of x in 8 bits, from a copy in the order in which they are multiplied.

A tile has 16 outputs. For each group of 32 inputs it has 4 vectors of 64 bytes, whose byte 4 o + k has the codes of
output o and inputs 4 i + k and 16 + 4 i + k in its halves, and then 16 scales and 16 lows. So nothing is moved between
lanes, which takes most of the time where codes are read as a file has them (integers/columns.py). The sums are those of
integers/tiles.py: the copy changes no bit.
"""

# llvmlite's builders and what numba compiles have no types, and an intrinsic's first argument is not its caller's.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, call-arg, attr-defined, var-annotated"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.formats.lanes import I8, I64, INTS, at, bits_of, floats_of_halves, scalar_at
from patchclamp_server.cpu.formats.rows import least
from patchclamp_server.cpu.integers.dots import add_products
from patchclamp_server.cpu.integers.rounding import ALL, RECORD, SCALE, SCALED_SUMS
from patchclamp_server.cpu.invariant.tiles import fma
from patchclamp_server.cpu.memory import aligned_records
from patchclamp_server.cpu.sparse.codes import Codes
from patchclamp_server.cpu.vector import FLOATS, LANES, LINE, UNIT, ZEROS, load, prefetch_line, splat, store

TILE = LANES
_CODES = TILE * UNIT // 2
_ACROSS = (1, 2, 4, 8)
# What is so many bytes further on is asked for.
_SOON = 1024
_BYTE_POINTER, _FLOAT, _BYTES = I8.as_pointer(), ir.FloatType(), ir.VectorType(I8, LINE)
_INT = types.int64

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True, eq=False)
class GlancedCodes:
    """tiles [out / 16, bytes]; scales are float16 where that holds them (`halves`), else float32."""

    tiles: NDArray[np.uint8]
    halves: bool
    groups: int

    def multiply(self, records: Tensor) -> Tensor:
        """Returns y [T, out] of the records of T rows (integers/rounding.py)."""
        n, tiles = len(records), len(self.tiles)
        y = torch.empty(n, tiles * TILE)
        place, size = self.tiles.ctypes.data, self.tiles.strides[0]
        x, target = records.data_ptr(), y.data_ptr()
        multiply_glanced(place, size, self.halves, self.groups, 0, tiles, x, n, target, tiles * TILE)
        return y

    @classmethod
    def of(cls, parts: Sequence[Codes | None]) -> "GlancedCodes | None":
        """Returns the copy of parts of a matrix that lie one above the other, or None unless all have codes of 4 bits
        in groups of 32 inputs, and together a multiple of 16 outputs."""
        own = [part for part in parts if part is not None and part.lows is not None and part.group == UNIT]
        if len(own) != len(parts) or sum(len(part.codes) for part in own) % TILE:
            return None
        codes = np.concatenate([part.codes for part in own]).astype(np.uint8, copy=False)
        groups = codes.shape[1] // UNIT
        # [tiles, outputs, groups, half, vector, byte]
        by_byte = codes.reshape(-1, TILE, groups, 2, 4, 4)
        packed = (by_byte[:, :, :, 0] | by_byte[:, :, :, 1] << 4).transpose(0, 2, 3, 1, 4)
        scales = np.stack([np.concatenate(table) for table in zip(*((p.scales, p.lows) for p in own), strict=True)])
        by_tile = np.ascontiguousarray(scales.reshape(2, -1, TILE, groups).transpose(1, 3, 0, 2), dtype=np.float32)
        with np.errstate(over="ignore"):
            short = by_tile.astype(np.float16)
        halves = bool((short.astype(np.float32) == by_tile).all())
        words = (short if halves else by_tile).view(np.uint8).reshape(len(by_tile), groups, -1)
        whole = np.concatenate((packed.reshape(len(by_tile), groups, _CODES), words), axis=2)
        tiles = aligned_records(len(by_tile), whole.shape[1] * whole.shape[2])
        tiles[:, : whole.shape[1] * whole.shape[2]] = whole.reshape(len(by_tile), -1)
        return cls(tiles, halves, groups)


@intrinsic(prefer_literal=True)
def _multiply(_context, halves, tiles, size, first, end, groups, x, n, y, stride):
    """Sets y[t stride + 16 i + o] for tiles first ≤ i < end of `size` bytes and n records of rows (rounding.py)."""
    signature = types.void(halves, *[_INT] * 9)
    size_of_scale = 2 if halves.literal_value else 4
    group_bytes = _CODES + 2 * TILE * size_of_scale

    def generate(context, b, signature, args):
        tiles, size, first, end, groups, x, n, y, stride = args[1:]
        row_bytes = b.mul(groups, I64(RECORD))

        def tile(columns: int, place: Any, t: Any, output: Any) -> None:
            last = b.sub(n, I64(1))
            rows = [least(b, b.add(t, I64(i)), last) for i in range(columns)]
            records = [b.inttoptr(b.add(x, b.mul(row, row_bytes)), _BYTE_POINTER) for row in rows]
            sums = [cgutils.alloca_once_value(b, ZEROS) for _ in rows]
            for total in sums:
                b.store(ZEROS, total)
            with cgutils.for_range(b, groups) as loop:
                block = b.gep(place, [b.mul(loop.index, I64(group_bytes))])
                for line in range(0, group_bytes, LINE):
                    prefetch_line(b, at(b, block, _SOON + line))
                own = [b.gep(record, [b.mul(loop.index, I64(RECORD))]) for record in records]
                dots = [ir.Constant(INTS, [0] * LANES)] * columns
                packed = [load(b, at(b, block, LINE * i), _BYTES) for i in range(4)]
                for shift in (0, 4):
                    for i, vector in enumerate(packed):
                        codes = b.bitcast(bits_of(b, vector, shift, 15), INTS)
                        for c, record in enumerate(own):
                            q = at(b, record, 4 * i + 4 * shift)
                            dots[c] = add_products(b, dots[c], codes, q, small=True)
                scale, low = (
                    _scales(b, at(b, block, _CODES + part * TILE * size_of_scale), size_of_scale) for part in range(2)
                )
                for record, dot, total in zip(own, dots, sums, strict=True):
                    step = splat(b, scalar_at(b, at(b, record, SCALE), _FLOAT))
                    value = fma(b, scale, b.fmul(b.sitofp(dot, FLOATS), step), b.load(total))
                    scaled = splat(b, scalar_at(b, at(b, record, SCALED_SUMS + 4 * ALL), _FLOAT))
                    b.store(fma(b, low, scaled, value), total)
            for row, total in zip(rows, sums, strict=True):
                target = b.inttoptr(y, _FLOAT.as_pointer())
                store(b, b.load(total), b.gep(target, [b.add(b.mul(row, stride), output)]))

        with cgutils.for_range_slice(b, first, end, I64(1), I64) as (i, _):
            place = b.inttoptr(b.add(tiles, b.mul(i, size)), _BYTE_POINTER)
            output, most = b.mul(i, I64(TILE)), _ACROSS[-1]
            with cgutils.for_range_slice(b, I64(0), n, I64(most), I64) as (t, _):
                _by_choice(b, b.sub(n, t), _ACROSS, lambda c, p=place, t=t, o=output: tile(c, p, t, o))
        return context.get_dummy_value()

    return signature, generate


def _scales(b: Any, pointer: Any, size: int) -> Any:
    return floats_of_halves(b, pointer) if size == 2 else load(b, pointer, FLOATS)


def _by_choice(b: Any, n: Any, choices: tuple[int, ...], body: Any) -> None:
    """Does `body` of the least choice that is not below n, or else of the last."""
    if len(choices) == 1:
        body(choices[0])
        return
    with b.if_else(b.icmp_signed("<=", n, I64(choices[0]))) as (then, otherwise):
        with then:
            body(choices[0])
        with otherwise:
            _by_choice(b, n, choices[1:], body)


@_compiled
def multiply_glanced(tiles, size, halves, groups, first, end, x, n, y, stride):
    """Sets outputs 16 first ≤ o < 16 end of y [n, stride], for n records of rows at address x: addresses."""
    if halves:
        _multiply(True, tiles, size, first, end, groups, x, n, y, stride)
    else:
        _multiply(False, tiles, size, first, end, groups, x, n, y, stride)
