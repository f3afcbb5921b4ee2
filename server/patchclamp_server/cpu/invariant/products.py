"""The bits of these products y = x Wᵀ do not depend on the number of rows: tiles.py runs over all rows of x.

Blocks of 16 outputs are read one after another, each for all tiles of rows while it is in the cache. The rows that are
left over have a smaller tile, in which the last one is repeated. numba compiles this once and caches it on disk; its
cache looks at this file alone, so a change in tiles.py needs a change here.

Least milliseconds of processor time for the products of SmolLM2-135M in 4-bit codes, from memory, on one shared core,
where several blocks side by side keep more sums going but read from several places:

    rows    one block    2 blocks    4 blocks    that of quantized.py
       1          8.8        13.9        11.7                     9.4
       2         10.2        15.6        13.5                    16.7
       4         15.0        20.2        17.7

In the cache, a tile of 12 rows has 111 gigaflops of codes and 117 of float32, where oneDNN has 99 to 108.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, var-annotated"

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.invariant.tiles import multiply_code_tile, multiply_tile, sum_of
from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.quantized import GROUP, LANES, QuantizedWeight

# A whole tile has 12 rows, and a smaller one takes the rest: about as many sums as there are registers.
_ROWS = 12
_SMALLER = (1, 2, 4, 8)
# So many operations take half as long as reading a byte of weights from memory: a second thread pays off sooner.
_OPERATIONS_A_BYTE = 4

_compiled = numba.njit(nogil=True, cache=True)


class RowProduct(Protocol):
    """Computes y = x Wᵀ, each row by itself."""

    def multiply(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ [T, out] of x [T, in] float32 on the CPU."""
        ...


@dataclass(frozen=True, eq=False)
class FloatTiles:
    """Holds weights [out / 16, in, 16], padded with zeros."""

    weights: NDArray[np.float32]
    out: int

    @classmethod
    def of(cls, weight: Tensor) -> "FloatTiles":
        """Makes the tiles of `weight` [out, in] float32."""
        out, width = weight.shape
        blocks = -(-out // LANES)
        padded = torch.zeros(blocks * LANES, width)
        padded[:out] = weight
        return cls(padded.view(blocks, LANES, width).transpose(1, 2).contiguous().numpy(), out)

    def multiply(self, x: Tensor) -> Tensor:
        blocks, depth, _ = self.weights.shape
        # Compiled code does not check shapes.
        assert x.shape[1:] == (depth,)
        rows = len(x)
        starts = tile_starts(rows)
        packed, _ = _pack(x, starts, with_sums=False)
        y = torch.empty(rows, blocks * LANES)
        work = partial(multiply_floats, self.weights.reshape(-1), depth, packed, starts, rows, y.view(-1).numpy())
        in_parts(work, blocks, 1, _cost(self.weights.nbytes, rows * self.weights.size))
        return y if y.shape[1] == self.out else y[:, : self.out].contiguous()


@dataclass(frozen=True, eq=False)
class CodeTiles:
    """Uses the codes that decoding reads, without a copy."""

    quantized: QuantizedWeight

    def multiply(self, x: Tensor) -> Tensor:
        codes, scales = self.quantized.codes, self.quantized.scale_and_low
        blocks, groups = codes.shape[:2]
        assert x.shape[1:] == (groups * GROUP,)
        rows = len(x)
        starts = tile_starts(rows)
        packed, sums = _pack(x, starts, with_sums=self.quantized.bits == 4)
        y = torch.empty(rows, blocks * LANES)
        work = partial(
            multiply_codes,
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
        in_parts(work, blocks, 1, _cost(codes.nbytes + scales.nbytes, rows * blocks * LANES * groups * GROUP))
        return y


def row_product(weight: Tensor, quantized: QuantizedWeight | None) -> RowProduct:
    return FloatTiles.of(weight) if quantized is None else CodeTiles(quantized)


def _cost(size: int, products: int) -> int:
    """Returns the cost in bytes read: of `size` bytes of weights, or of the multiply-adds where those take longer."""
    return max(size, 2 * products // _OPERATIONS_A_BYTE)


@lru_cache(1024)
def tile_starts(rows: int) -> NDArray[np.int64]:
    """Returns the first row of each tile, and where the last one ends."""
    whole, left = divmod(rows, _ROWS)
    sizes = [_ROWS] * whole
    if left:
        sizes.append(next((n for n in _SMALLER if n >= left), _ROWS))
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def _pack(x: Tensor, starts: NDArray[np.int64], *, with_sums: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Packs the rows of x by tile, each as [in, R], and sums their groups."""
    depth = x.shape[1]
    array = x.contiguous().numpy()
    end = int(starts[-1])
    # A single row needs no packing.
    packed = array.reshape(-1) if end == 1 else np.empty(end * depth, dtype=np.float32)
    sums = np.empty(end * (depth // GROUP) if with_sums else 0, dtype=np.float32)
    if end > 1 or with_sums:
        _pack_rows(array, starts, packed, sums)
    return packed, sums


@_compiled
def _pack_rows(x, starts, packed, sums):  # type: ignore[no-untyped-def]
    for tile in range(starts.shape[0] - 1):
        pack_tile(x, starts, tile, packed, sums)


@_compiled
def pack_tile(x, starts, tile, packed, sums):  # type: ignore[no-untyped-def]
    """Packs one tile of the rows of x, and sums their groups where `sums` is not empty; a single row stays."""
    n, depth = x.shape
    rows = starts[tile + 1] - starts[tile]
    for r in range(rows):
        own = x[min(starts[tile] + r, n - 1)]
        if starts[-1] > 1:
            at = packed[starts[tile] * depth + r :]
            for k in range(depth):
                at[k * rows] = own[k]
        if sums.shape[0]:
            at = sums[starts[tile] * (depth // GROUP) + r :]
            for g in range(depth // GROUP):
                at[g * rows] = sum_of(own, g * GROUP, GROUP)


@_compiled
def multiply_floats(weights, depth, x, starts, n, y, start, end):  # type: ignore[no-untyped-def]
    """Computes the outputs of the blocks start ≤ b < end."""
    size = depth * LANES
    width = weights.shape[0] // depth
    for b in range(start, end):
        w, o = b * size, b * LANES
        for tile in range(starts.shape[0] - 1):
            t = starts[tile]
            rows = starts[tile + 1] - t
            at = t * depth
            if rows == 1:
                multiply_tile(weights, w, x, at, depth, y, _rows_1(t, n, width, o))
            elif rows == 2:
                multiply_tile(weights, w, x, at, depth, y, _rows_2(t, n, width, o))
            elif rows == 4:
                multiply_tile(weights, w, x, at, depth, y, _rows_4(t, n, width, o))
            elif rows == 8:
                multiply_tile(weights, w, x, at, depth, y, _rows_8(t, n, width, o))
            else:
                multiply_tile(weights, w, x, at, depth, y, _rows_12(t, n, width, o))


@_compiled
def multiply_codes(codes, scales, groups, size, x, sums, starts, n, y, start, end):  # type: ignore[no-untyped-def]
    """Does the same with codes, of which a group of a block has `size` elements."""
    depth = groups * GROUP
    width = codes.shape[0] // (groups * size) * LANES
    for b in range(start, end):
        c, s, o = b * groups * size, b * groups * 2 * LANES, b * LANES
        for tile in range(starts.shape[0] - 1):
            t = starts[tile]
            rows = starts[tile + 1] - t
            a, g = t * depth, t * groups
            if rows == 1:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_1(t, n, width, o))
            elif rows == 2:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_2(t, n, width, o))
            elif rows == 4:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_4(t, n, width, o))
            elif rows == 8:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_8(t, n, width, o))
            else:
                multiply_code_tile(codes, c, scales, s, x, a, sums, g, groups, y, _rows_12(t, n, width, o))


# These tell where the rows of a tile begin in y, at output o. Rows past the last one repeat it.


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
