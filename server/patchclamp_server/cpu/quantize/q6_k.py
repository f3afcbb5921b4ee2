"""Q6_K: sixteen groups of 16 weights, x = d·s·(c - 32) with a 6-bit code c; s of a group is an int8.

A block of 210 bytes has the lower four bits of the codes, their upper two, the scales and d (float16; `block_q6_K` of
ggml-common.h). Groups have their scale by search (search.py), it is rounded to an int8 of the largest in the block,
and codes are those nearest to each weight under what was rounded.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.quantize.search import compiled, symmetric

BLOCK, GROUPS, GROUP = 256, 16, 16
BOUND = 32
_UPPER, _SCALES, _NUMBER = 128, 192, 208


def quantize_q6_k(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns blocks [n, width / 256 · 210] of finite rows [n, width]."""
    x = rows.reshape(-1, GROUPS, GROUP)
    scales = np.empty((len(x), GROUPS), dtype=np.float32)
    _search(x, scales)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)[:, 0]
    numbers = (largest / np.float32(-128)).astype(np.float16)
    blocks = np.zeros((len(x), 210), dtype=np.uint8)
    blocks[:, _NUMBER:] = numbers[:, None].view(np.uint8)
    _encode(x, scales, numbers.astype(np.float32), blocks)
    return blocks.reshape(len(rows), -1)


@compiled
def _search(x, scales):  # type: ignore[no-untyped-def]
    for block in range(x.shape[0]):
        for group in range(GROUPS):
            scales[block, group] = symmetric(x[block, group], BOUND)


@compiled
def _encode(x, scales, numbers, blocks):  # type: ignore[no-untyped-def]
    codes = np.empty(BLOCK, dtype=np.uint8)
    for block in range(x.shape[0]):
        number = numbers[block]
        for group in range(GROUPS):
            own = np.rint(scales[block, group] / number) if number != 0 else np.float32(0)
            own = min(max(own, np.float32(-128)), np.float32(127))
            blocks[block, _SCALES + group] = np.uint8(np.int32(own) & 255)
            scale = number * own
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            for k in range(GROUP):
                code = min(max(np.rint(x[block, group, k] * inverse), np.float32(-BOUND)), np.float32(BOUND - 1))
                codes[group * GROUP + k] = np.uint8(np.int32(code) + BOUND)
        # Half a block at a time: its weights k, k + 32, k + 64 and k + 96 share their bytes.
        for half in range(2):
            for k in range(32):
                a, b = codes[128 * half + k], codes[128 * half + 32 + k]
                c, d = codes[128 * half + 64 + k], codes[128 * half + 96 + k]
                blocks[block, 64 * half + k] = (a & 15) | ((c & 15) << 4)
                blocks[block, 64 * half + 32 + k] = (b & 15) | ((d & 15) << 4)
                upper = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
                blocks[block, _UPPER + 32 * half + k] = upper
