"""Products y = x Wᵀ with weights as a file holds them, whose bits do not depend on the number of rows or of threads.

For few rows of x a tile reads blocks and multiplies at once (`direct`). For more rows a panel of weights is made
float32 and stays in the cache while the tiles run over the rows of x, in parts of the inputs; the sums are the same
chains (formats/tiles.py). Each format has a function of its own for either, which numba compiles when a matrix of that
format is first made.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="attr-defined, call-arg, no-untyped-call, no-untyped-def, var-annotated"

from enum import IntEnum
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.atomics import bytes_at, call_with, ints_at, keep
from patchclamp_server.cpu.formats.halves import TABLE
from patchclamp_server.cpu.formats.table import step_of
from patchclamp_server.cpu.formats.tiles import (
    ACROSS,
    MOST,
    MOST_DIRECT,
    dequantize_stored,
    multiply_panel,
    multiply_stored,
)
from patchclamp_server.cpu.integers.products import functions_of as integer_functions_of
from patchclamp_server.cpu.integers.products import multiply_rounded, record_bytes, round_rows
from patchclamp_server.cpu.integers.rounding import RECORD, SCALE
from patchclamp_server.cpu.integers.table import CODES
from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.stored import Format, StoredMatrix
from patchclamp_server.cpu.vector import LANES, LINE, UNIT, prefetch

# A panel has so many rows of weights, a multiple of those of all tiles, and so many inputs at most; it is used for so
# many rows of x before it is made again.
PANEL, _INPUTS, _BLOCK = 24, 1024, 64
# So many chosen rows are multiplied at a time, and so many asked for.
_AHEAD = 16
# So many operations take half as long as reading a byte of weights from memory: a second thread pays off sooner.
_OPERATIONS_A_BYTE = 4

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


class Field(IntEnum):
    """What compiled code knows of a part of a matrix."""

    ROWS = 0
    STARTS = 1  # address of int64 [rows], bytes
    MEMORY = 2  # address
    DIRECT = 3  # addresses of the functions of the format
    DEQUANTIZE = 4
    STEP_WEIGHTS = 5
    STEP_BYTES = 6
    # Where activations are rounded to 8 bits, the functions for that and the bytes of a block once read, or else 0.
    ROUNDED = 7
    READ = 8
    MULTIPLY_READ = 9
    READ_BYTES = 10
    HALVES = 11  # address of the table of formats/halves.py


FIELDS = len(Field)
(
    _ROWS, _STARTS, _MEMORY, _DIRECT, _DEQUANTIZE, _STEP_WEIGHTS, _STEP_BYTES,
    _ROUNDED, _READ, _MULTIPLY_READ, _READ_BYTES, _HALVES,
) = (int(field) for field in Field)  # fmt: skip


@cache
def functions_of(format: Format) -> tuple[Any, Any]:
    """Returns the compiled functions of a format, direct and dequantize. Their code lives as long as these objects."""
    code = int(format)

    @numba.cfunc(types.void(*[types.int64] * 10), cache=True)
    def direct(halves, starts, memory, first, end, width, x, n, y, stride):
        multiply_stored(code, halves, starts, memory, first, end, width, x, n, y, stride)

    @numba.cfunc(types.void(*[types.int64] * 5), cache=True)
    def dequantize(halves, source, steps, left, target):
        dequantize_stored(code, halves, source, steps, left, target)

    return direct, dequantize


def can_round(matrix: StoredMatrix) -> bool:
    """Returns whether a matrix has codes, whose products may take activations in 8 bits: floats are not such."""
    return any(part.format in CODES for part in matrix.parts)


def describe(matrix: StoredMatrix, *, rounds: bool = False) -> NDArray[np.int64]:
    """Returns the parts of a matrix [parts, FIELDS]; their memory must outlive it.

    `rounds`: products with codes take activations in 8 bits.
    """
    table = np.zeros((len(matrix.parts), FIELDS), dtype=np.int64)
    for own, part in zip(table, matrix.parts, strict=True):
        step = step_of(part.format)
        assert part.starts.flags.c_contiguous
        own[Field.ROWS], own[Field.STARTS] = len(part.starts), part.starts.ctypes.data
        own[Field.MEMORY] = part.memory.ctypes.data
        own[Field.DIRECT], own[Field.DEQUANTIZE] = (function.address for function in functions_of(part.format))
        own[Field.HALVES] = TABLE.ctypes.data
        own[Field.STEP_WEIGHTS], own[Field.STEP_BYTES] = step.weights, step.size
        if rounds and part.format in CODES:
            functions = integer_functions_of(part.format)
            own[Field.ROUNDED : Field.READ_BYTES] = [function.address for function in functions]
            own[Field.READ_BYTES] = CODES[part.format].block_bytes
    return table


@_compiled
def multiply_rows(parts, width, x, rounded, n, y, stride, start, end):
    """Computes outputs start ≤ o < end of y [n, stride] = x Wᵀ, for addresses of x [n, width] and y.

    Parts that are described so take x as it is `rounded`, at the address of its records, unless that is 0.
    """
    if n == 0:
        return
    first = 0
    for p in range(parts.shape[0]):
        own = parts[p]
        rows = own[_ROWS]
        o, last = max(0, start - first), min(rows, end - first)
        if o < last:
            if rounded != 0 and own[_ROUNDED] != 0:
                _multiply_rounded(own, width, rounded, n, y + first * 4, stride, o, last, own[_STARTS])
            elif n <= MOST_DIRECT:
                call_with(
                    own[_DIRECT], own[_HALVES], own[_STARTS], own[_MEMORY], o, last, width, x, n, y + first * 4, stride
                )
            else:
                _multiply_panels(own, width, x, n, y + first * 4, stride, o, last)
        first += rows


@_compiled
def _multiply_rounded(part, width, x, n, y, stride, start, end, starts):
    multiply_rounded(
        part[_ROUNDED], part[_READ], part[_MULTIPLY_READ], part[_READ_BYTES], part[_STEP_WEIGHTS], part[_STEP_BYTES],
        starts, part[_MEMORY], width, x, n, y, stride, start, end,
    )  # fmt: skip


@_compiled
def multiply_chosen(parts, width, x, rounded, n, y, stride, outputs, start, end):
    """Sets y[t stride + i] = x_t · W_outputs[i] for start ≤ i < end and ascending outputs; others are not read."""
    chosen = np.empty(end - start, dtype=np.int64)
    first, i = 0, start
    for p in range(parts.shape[0]):
        own = parts[p]
        starts = carray(ints_at(own[_STARTS]), (own[_ROWS],))
        last = i
        while last < end and outputs[last] < first + own[_ROWS]:
            chosen[last - start] = starts[outputs[last] - first]
            last += 1
        memory, lines = own[_MEMORY], (width // own[_STEP_WEIGHTS] * own[_STEP_BYTES] + LINE - 1) // LINE
        stored = carray(bytes_at(memory), (1,))
        while i < last:
            # Rows that are skipped end the processor's own prefetching: some rows are asked for ahead.
            for r in range(min(last, i + _AHEAD), min(last, i + 2 * _AHEAD)):
                prefetch(stored, chosen[r - start], lines)
            begin, rows = chosen[i - start :].ctypes.data, min(_AHEAD, last - i)
            if rounded != 0 and own[_ROUNDED] != 0:
                _multiply_rounded(own, width, rounded, n, y + i * 4, stride, 0, rows, begin)
                i += rows
                continue
            for t in range(0, n, MOST_DIRECT):
                own_x, own_y = x + t * width * 4, y + (t * stride + i) * 4
                count = min(MOST_DIRECT, n - t)
                call_with(own[_DIRECT], own[_HALVES], begin, memory, 0, rows, width, own_x, count, own_y, stride)
            i += rows
        first += own[_ROWS]
    keep(chosen)


@_compiled
def _multiply_panels(part, width, x, n, y, stride, start, end):
    starts = carray(ints_at(part[_STARTS]), (part[_ROWS],))
    memory, dequantize = part[_MEMORY], part[_DEQUANTIZE]
    weights, size = part[_STEP_WEIGHTS], part[_STEP_BYTES]
    steps = width // weights
    blocks = max(1, (width + _INPUTS - 1) // _INPUTS)
    a_block = (steps + blocks - 1) // blocks
    depth = a_block * weights + UNIT
    panel = np.empty(PANEL * depth + LANES, dtype=np.float32)
    sums = np.empty(0 if blocks == 1 else (_BLOCK + MOST) * PANEL * LANES, dtype=np.float32)
    panel_at, sums_at = panel.ctypes.data, sums.ctypes.data
    for t0 in range(0, n, _BLOCK):
        t1 = min(n, t0 + _BLOCK)
        for o in range(start, end, PANEL):
            rows = min(PANEL, end - o)
            for block in range(blocks):
                s = block * a_block
                own = min(a_block, steps - s)
                left = width - steps * weights if block == blocks - 1 else 0
                for r in range(rows):
                    source = memory + starts[o + r] + s * size
                    call_with(dequantize, part[_HALVES], source, own, left, panel_at + r * depth * 4)
                t, kept = t0, sums_at
                while t < t1:
                    across = _across(t1 - t)
                    multiply_panel(
                        across, panel_at, depth, rows, x + s * weights * 4, width, t, t1, own * weights // UNIT, left,
                        kept, block == 0, block == blocks - 1, y + o * 4, stride,
                    )  # fmt: skip
                    t += across
                    kept += across * (PANEL * LANES * 4)
    keep(panel)
    keep(sums)


@_compiled
def _across(rows):
    """Returns the rows of the next tile."""
    return MOST if rows >= MOST else ACROSS[rows]


@_compiled
def _dequantize_rows(parts, width, outputs, target):
    """Sets target [n, width] to the weights of these outputs."""
    for i in range(outputs.shape[0]):
        o, p = outputs[i], 0
        while o >= parts[p, _ROWS]:
            o -= parts[p, _ROWS]
            p += 1
        own = parts[p]
        steps, left = width // own[_STEP_WEIGHTS], width % own[_STEP_WEIGHTS]
        # What follows the last whole step is filled up to one.
        whole = np.empty(width + UNIT if left else 0, dtype=np.float32)
        place = whole.ctypes.data if left else target[i].ctypes.data
        source = own[_MEMORY] + carray(ints_at(own[_STARTS]), (own[_ROWS],))[o]
        call_with(own[_DEQUANTIZE], own[_HALVES], source, steps, left, place)
        if left:
            target[i] = whole[:width]
        keep(whole)


class StoredProduct:
    """Computes y = x Wᵀ, each row by itself."""

    def __init__(self, matrix: StoredMatrix, *, rounds: bool = False) -> None:
        """`rounds`: codes are multiplied by x in 8 bits (integers/), floats by x as it is."""
        self.matrix = matrix
        self.rounds = rounds and can_round(matrix)
        self.parts = describe(matrix, rounds=self.rounds)

    def multiply(self, x: Tensor, *, exact: bool = False) -> Tensor:
        """Returns x Wᵀ [T, out] of x [T, in] float32 on the CPU. `exact`: of x that is not rounded."""
        out, width = self.matrix.shape
        # Compiled code does not check shapes.
        assert x.shape[1:] == (width,)
        assert x.dtype == torch.float32
        rows = len(x)
        x = x.contiguous()
        y = torch.empty(rows, out)
        records = None if exact else self._rounded(x.data_ptr(), rows)
        rounded = 0 if records is None else records.data_ptr()
        work = partial(multiply_rows, self.parts, width, x.data_ptr(), rounded, rows, y.data_ptr(), out)
        in_parts(work, out, PANEL, max(self.matrix.nbytes, 2 * rows * out * width // _OPERATIONS_A_BYTE))
        return y

    def multiply_chosen(self, x: NDArray[np.float32], outputs: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns the chosen, ascending outputs of x [T, in]: [T, n], the bits that `multiply` gives."""
        width, n = self.matrix.shape[1], len(outputs)
        assert x.shape[1:] == (width,)
        assert x.flags.c_contiguous
        y = np.empty((len(x), n), dtype=np.float32)
        records = self._rounded(x.ctypes.data, len(x))
        rounded = 0 if records is None else records.data_ptr()
        work = partial(multiply_chosen, self.parts, width, x.ctypes.data, rounded, len(x), y.ctypes.data, n, outputs)
        in_parts(work, n, PANEL, n * self.matrix.nbytes // self.matrix.shape[0])
        return y

    def taken(self, x: Tensor) -> Tensor:
        """Returns x [T, in] as codes are multiplied by it: in float32, s q where it is rounded."""
        x = x.contiguous()
        records = self._rounded(x.data_ptr(), len(x))
        if records is None:
            return x
        groups = records.view(len(x), -1, RECORD)
        scales = groups[:, :, SCALE : SCALE + 4].contiguous().view(torch.float32)
        return (groups[:, :, :UNIT].view(torch.int8) * scales).view(x.shape)

    def chosen(self, outputs: NDArray[np.int64]) -> "StoredProduct":
        """Returns the product with the rows of ascending outputs, without a copy of the weights."""
        return StoredProduct(self.matrix.chosen(outputs), rounds=self.rounds)

    def rounded(self, x: Tensor) -> Tensor:
        """Returns the records of x [T, in] float32, of a product that takes them."""
        x = x.contiguous()
        records = self._rounded(x.data_ptr(), len(x))
        assert records is not None
        return records

    def _rounded(self, x: int, n: int) -> Tensor | None:
        """Returns the records of n rows at an address, where any product takes them."""
        if not self.rounds:
            return None
        width = self.matrix.shape[1]
        records = torch.empty(n, record_bytes(width), dtype=torch.uint8)
        in_parts(partial(round_rows, x, width, records.data_ptr()), n, 1, 4 * n * width)
        return records

    def rows(self, outputs: Tensor) -> Tensor:
        """Returns the weights of outputs [n], as [n, in] float32. Raises IndexError for an output that is none."""
        out, width = self.matrix.shape
        index = outputs.numpy()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < out:
            raise IndexError(f"outputs are 0 to {out - 1}")
        weights = torch.empty(len(index), width)
        in_parts(lambda start, end: self._dequantize(index, weights, start, end), len(index), 1, weights.nbytes)
        return weights

    def _dequantize(self, index: NDArray[np.int64], weights: Tensor, start: int, end: int) -> None:
        _dequantize_rows(self.parts, self.matrix.shape[1], index[start:end], weights.numpy()[start:end])
