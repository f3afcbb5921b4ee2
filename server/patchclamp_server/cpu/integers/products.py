"""Products of parts of a matrix with rounded rows: a function of each format, which numba compiles when a matrix of it
is first made."""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, var-annotated"

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from patchclamp_server.cpu.atomics import call_with, keep
from patchclamp_server.cpu.integers.rounding import RECORD, round_groups
from patchclamp_server.cpu.integers.tiles import DIRECT, ROWS, multiply_codes, multiply_read_codes, read_codes
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import LINE, UNIT

# The inputs of a panel of codes, and the rows of x that it is used for before it is made again.
_INPUTS, _BLOCK = 1024, 256
MOST_DIRECT = max(DIRECT)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@cache
def functions_of(format: Format) -> tuple[Any, Any, Any]:
    """Returns the compiled functions of a format. Their code lives as long as these objects."""
    code = int(format)

    @numba.cfunc(types.void(*[types.int64] * 9), cache=True)
    def direct(starts, memory, first, end, blocks, x, n, y, stride):
        multiply_codes(code, starts, memory, first, end, blocks, x, n, y, stride)

    @numba.cfunc(types.void(*[types.int64] * 7), cache=True)
    def read(starts, memory, first, end, skip, blocks, target):
        read_codes(code, starts, memory, first, end, skip, blocks, target)

    @numba.cfunc(types.void(*[types.int64] * 9), cache=True)
    def multiply(panel, blocks, x, row, n, begins, y, stride, outputs):
        multiply_read_codes(code, panel, blocks, x, row, n, begins, y, stride, outputs)

    return direct, read, multiply


def record_bytes(width: int) -> int:
    """Returns the bytes of a rounded row."""
    return width // UNIT * RECORD


@_compiled
def round_rows(x, width, target, start, end):
    """Writes the records of rows start ≤ i < end of x [n, width] at an address to those at the address `target`."""
    groups = width // UNIT
    for i in range(start, end):
        round_groups(x + i * width * 4, groups, target + i * groups * RECORD)


@_compiled
def multiply_rounded(
    direct, read, multiply, panel_bytes, weights, size, starts, memory, width, x, n, y, stride, start, end
):
    """Sets outputs start ≤ o < end of a part, y[t stride + o], for n rounded rows at address x.

    The functions are those of its format, whose blocks have so many weights and bytes, and panel_bytes once read.
    """
    blocks = width // weights
    if n <= MOST_DIRECT:
        call_with(direct, starts, memory, start, end, blocks, x, n, y, stride)
        return
    pieces = max(1, (width + _INPUTS - 1) // _INPUTS)
    piece = (blocks + pieces - 1) // pieces
    panel = np.empty(piece * panel_bytes + LINE, dtype=np.uint8)
    panel_at = (panel.ctypes.data + LINE - 1) // LINE * LINE
    row = width // UNIT * RECORD
    for t in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - t)
        for o in range(start, end, ROWS):
            outputs = min(ROWS, end - o)
            for s in range(0, blocks, piece):
                own = min(piece, blocks - s)
                call_with(read, starts, memory, o, end, s * size, own, panel_at)
                own_x, own_y = x + t * row + s * (weights // UNIT * RECORD), y + (t * stride + o) * 4
                call_with(multiply, panel_at, own, own_x, row, rows, 1 if s == 0 else 0, own_y, stride, outputs)
    keep(panel)
