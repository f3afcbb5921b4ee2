"""Products y = x Wᵀ whose bits do not depend on the number of rows: the tiles of tiles.py over all rows of x.

Blocks of 16 outputs are read one after another, each for all tiles of rows while it is in the cache. The rows that are
left over have a smaller tile, in which the last one is repeated. Compiled once and cached on disk; numba's cache looks
at this file alone, so a change in tiles.py needs one here.

Gigaflops of one core of the machine that the table of linear.py is of, weights in the cache, with oneDNN's in brackets:

    rows  3072 x 576, 4-bit codes   float32       576 x 1536, 4-bit codes   float32
       1        55                  46 (33)             56                  47 (30)
       4        97                 116 (92)             98                 113 (87)
      12       111                 117 (107)           111                 116 (99)
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, var-annotated"

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.model.invariant.tiles import multiply_code_tile, multiply_tile
from patchclamp_server.model.quantized import GROUP, LANES, QuantizedWeight
from patchclamp_server.model.sparse.memory import in_parts

# Rows of a whole tile, and of one for what is left: about as many sums as there are registers.
_ROWS = 12
_SMALLER = (1, 2, 4, 8)
# Blocks of outputs that tiles of up to 4 rows compute side by side; a matrix of fewer has larger tiles only.
_SIDE_BY_SIDE = 4
# Operations that take half as long as reading a byte of weights from memory: a second thread is worth waking sooner.
_OPERATIONS_A_BYTE = 4

_compiled = numba.njit(nogil=True, cache=True)


class RowProduct(Protocol):
    """y = x Wᵀ, each row by itself."""

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] float32 on the CPU -> [T, out]."""
        ...


@dataclass(frozen=True, eq=False)
class FloatTiles:
    """weights [out / 16, in, 16], filled up with zeros."""

    weights: NDArray[np.float32]
    out: int

    @classmethod
    def of(cls, weight: Tensor) -> "FloatTiles":
        """`weight` [out, in] float32."""
        out, width = weight.shape
        blocks = -(-out // LANES)
        padded = torch.zeros(blocks * LANES, width)
        padded[:out] = weight
        return cls(padded.view(blocks, LANES, width).transpose(1, 2).contiguous().numpy(), out)

    def multiply(self, x: Tensor) -> Tensor:
        blocks, depth, _ = self.weights.shape
        rows = len(x)
        starts, packed, _ = _pack(x, blocks, with_sums=False)
        y = torch.empty(rows, blocks * LANES)
        work = partial(_multiply_floats, self.weights.reshape(-1), depth, packed, starts, rows, y.view(-1).numpy())
        in_parts(work, blocks, _SIDE_BY_SIDE, _cost(self.weights.nbytes, rows * self.weights.size))
        return y if y.shape[1] == self.out else y[:, : self.out].contiguous()


@dataclass(frozen=True, eq=False)
class CodeTiles:
    """The codes that decoding reads, no copy."""

    quantized: QuantizedWeight

    def multiply(self, x: Tensor) -> Tensor:
        codes, scales = self.quantized.codes, self.quantized.scale_and_low
        blocks, groups = codes.shape[:2]
        rows = len(x)
        starts, packed, sums = _pack(x, blocks, with_sums=self.quantized.bits == 4)
        y = torch.empty(rows, blocks * LANES)
        work = partial(
            _multiply_codes,
            codes.reshape(-1),
            scales.reshape(-1),
            groups,
            codes.shape[2] * LANES,
            packed,
            sums,
            starts,
            rows,
            y.view(-1).numpy(),
        )
        in_parts(work, blocks, _SIDE_BY_SIDE, _cost(codes.nbytes + scales.nbytes, rows * blocks * LANES * groups * GROUP))
        return y


def row_product(weight: Tensor, quantized: QuantizedWeight | None) -> RowProduct:
    return FloatTiles.of(weight) if quantized is None else CodeTiles(quantized)


def _cost(size: int, products: int) -> int:
    """In bytes read: of weights of `size` bytes, or of so many multiply-adds where those take longer."""
    return max(size, 2 * products // _OPERATIONS_A_BYTE)


def _pack(
    x: Tensor, blocks: int, *, with_sums: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Rows of x by tile: first row of each tile and their end, [in, R] of each, and the sums of their groups."""
    rows, depth = x.shape
    whole, left = divmod(rows, _ROWS)
    ends = [_ROWS] * whole
    if left:
        sizes = _SMALLER if blocks >= _SIDE_BY_SIDE else _SMALLER[-1:]
        ends.append(next((n for n in sizes if n >= left), _ROWS))
    starts = np.concatenate(([0], np.cumsum(ends, dtype=np.int64)))
    packed = np.empty(int(starts[-1]) * depth, dtype=np.float32)
    sums = np.empty(int(starts[-1]) * (depth // GROUP) if with_sums else 0, dtype=np.float32)
    _pack_rows(x.contiguous().numpy(), starts, packed, sums)
    return starts, packed, sums


@_compiled
def _pack_rows(x, starts, packed, sums):  # type: ignore[no-untyped-def]
    n, depth = x.shape
    for tile in range(starts.shape[0] - 1):
        rows = starts[tile + 1] - starts[tile]
        for r in range(rows):
            row = min(starts[tile] + r, n - 1)
            at = starts[tile] * depth + r
            for k in range(depth):
                packed[at + k * rows] = x[row, k]
            if sums.shape[0]:
                at = starts[tile] * (depth // GROUP) + r
                for g in range(depth // GROUP):
                    total = np.float32(0)
                    for k in range(GROUP):
                        total += x[row, g * GROUP + k]
                    sums[at + g * rows] = total


@_compiled
def _multiply_floats(weights, depth, x, starts, n, y, start, end):  # type: ignore[no-untyped-def]
    """Outputs of the blocks start ≤ b < end. The last four of them may have been computed in part before."""
    size = depth * LANES
    width = weights.shape[0] // depth
    for b in range(start, end, _SIDE_BY_SIDE):
        last = min(b + _SIDE_BY_SIDE, end)
        first = last - _SIDE_BY_SIDE
        w = (first * size, (first + 1) * size, (first + 2) * size, (first + 3) * size)
        for tile in range(starts.shape[0] - 1):
            rows = starts[tile + 1] - starts[tile]
            at = starts[tile] * depth
            if rows == 1:
                multiply_tile(weights, w, x, at, depth, y, _rows_1(starts[tile], n, width, first * LANES))
            elif rows == 2:
                multiply_tile(weights, w, x, at, depth, y, _rows_2(starts[tile], n, width, first * LANES))
            elif rows == 4:
                multiply_tile(weights, w, x, at, depth, y, _rows_4(starts[tile], n, width, first * LANES))
            else:
                for i in range(b, last):
                    if rows == 8:
                        multiply_tile(weights, (i * size,), x, at, depth, y, _rows_8(starts[tile], n, width, i * LANES))
                    else:
                        multiply_tile(
                            weights, (i * size,), x, at, depth, y, _rows_12(starts[tile], n, width, i * LANES)
                        )


@_compiled
def _multiply_codes(codes, scales, groups, size, x, sums, starts, n, y, start, end):  # type: ignore[no-untyped-def]
    """The same of codes, of which a group of a block has `size` elements."""
    depth = groups * GROUP
    codes_size, scales_size = groups * size, groups * 2 * LANES
    width = codes.shape[0] // codes_size * LANES
    for b in range(start, end, _SIDE_BY_SIDE):
        last = min(b + _SIDE_BY_SIDE, end)
        first = last - _SIDE_BY_SIDE
        c = (first * codes_size, (first + 1) * codes_size, (first + 2) * codes_size, (first + 3) * codes_size)
        s = (first * scales_size, (first + 1) * scales_size, (first + 2) * scales_size, (first + 3) * scales_size)
        for tile in range(starts.shape[0] - 1):
            t = starts[tile]
            rows = starts[tile + 1] - t
            a, g = t * depth, t * groups
            o = first * LANES
            if rows == 1:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_1(t, n, width, o))
            elif rows == 2:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_2(t, n, width, o))
            elif rows == 4:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_4(t, n, width, o))
            else:
                for i in range(b, last):
                    o = i * LANES
                    ci, si = (i * codes_size,), (i * scales_size,)
                    if rows == 8:
                        multiply_code_tile(codes, ci, scales, si, x, a, sums, g, groups, y, _rows_8(t, n, width, o))
                    else:
                        multiply_code_tile(codes, ci, scales, si, x, a, sums, g, groups, y, _rows_12(t, n, width, o))


# Where the rows of a tile begin in y, at output o. Those past the last row are the last row.


@_compiled
def _row(t, n, width, o):  # type: ignore[no-untyped-def]
    return min(t, n - 1) * width + o


@_compiled
def _rows_1(t, n, width, o):  # type: ignore[no-untyped-def]
    return (_row(t, n, width, o),)


@_compiled
def _rows_2(t, n, width, o):  # type: ignore[no-untyped-def]
    return _row(t, n, width, o), _row(t + 1, n, width, o)


@_compiled
def _rows_4(t, n, width, o):  # type: ignore[no-untyped-def]
    return _rows_2(t, n, width, o) + _rows_2(t + 2, n, width, o)


@_compiled
def _rows_8(t, n, width, o):  # type: ignore[no-untyped-def]
    return _rows_4(t, n, width, o) + _rows_4(t + 4, n, width, o)


@_compiled
def _rows_12(t, n, width, o):  # type: ignore[no-untyped-def]
    return _rows_8(t, n, width, o) + _rows_4(t + 8, n, width, o)
