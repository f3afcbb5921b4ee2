"""Q4_K: eight groups of 32 weights, x = d·s·c - dmin·m with a 4-bit code c; s and m of a group have 6 bits.

A block of 144 bytes has d and dmin (float16), the 16 numbers s and m in 12 bytes, and two codes in a byte: of groups
2i and 2i + 1 (`block_q4_K` of ggml-common.h). Groups have their scale and minimum by search (search.py), these are
rounded to six bits of the largest in the block, and codes are those nearest to each weight under what was rounded.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.quantize.search import affine, compiled

BLOCK, GROUPS, GROUP = 256, 8, 32
TOP = 15
# The largest number of six bits.
_SIX = 63
_HEADER = 4
_CODES = _HEADER + 12


def quantize_q4_k(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns blocks [n, width / 256 · 144] of finite rows [n, width]."""
    x = rows.reshape(-1, GROUPS, GROUP)
    scales = np.empty((2, len(x), GROUPS), dtype=np.float32)
    _search(x, scales)
    largest = scales.max(axis=2)  # [2, blocks]
    numbers = (largest / np.float32(_SIX)).astype(np.float16)
    blocks = np.zeros((len(x), 144), dtype=np.uint8)
    blocks[:, :_HEADER] = np.ascontiguousarray(numbers.T).view(np.uint8)
    _encode(x, scales, numbers.astype(np.float32), blocks)
    return blocks.reshape(len(rows), -1)


@compiled
def _search(x, scales):  # type: ignore[no-untyped-def]
    """Writes the scales and the negated minima [2, blocks, 8] of x [blocks, 8, 32]."""
    weight = np.empty(GROUP, dtype=np.float32)
    for block in range(x.shape[0]):
        for group in range(GROUPS):
            scale, minimum = affine(x[block, group], weight, TOP, np.float32(0))
            scales[0, block, group] = scale
            scales[1, block, group] = -minimum


@compiled
def _encode(x, scales, numbers, blocks):  # type: ignore[no-untyped-def]
    six = np.empty((2, GROUPS), dtype=np.uint8)
    codes = np.empty((GROUPS, GROUP), dtype=np.uint8)
    for block in range(x.shape[0]):
        for group in range(GROUPS):
            for i in range(2):
                number = numbers[i, block]
                own = np.rint(scales[i, block, group] / number) if number > 0 else np.float32(0)
                six[i, group] = np.uint8(min(own, np.float32(_SIX)))
            scale = numbers[0, block] * np.float32(six[0, group])
            minimum = numbers[1, block] * np.float32(six[1, group])
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            for k in range(GROUP):
                code = np.rint((x[block, group, k] + minimum) * inverse)
                codes[group, k] = np.uint8(min(max(code, np.float32(0)), np.float32(TOP)))
        for i in range(2):
            for group in range(GROUPS // 2):
                late = six[i, group + GROUPS // 2]
                # The upper two bits of a late number are those above six of an early one.
                blocks[block, _HEADER + 4 * i + group] = six[i, group] | ((late >> 4) << 6)
                blocks[block, _HEADER + 8 + group] |= (late & 15) << (4 * i)
        for pair in range(GROUPS // 2):
            for k in range(GROUP):
                blocks[block, _CODES + pair * GROUP + k] = codes[2 * pair, k] | (codes[2 * pair + 1, k] << 4)
