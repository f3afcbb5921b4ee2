"""Q4_0, Q5_0, Q4_1 and Q5_1: blocks of 32 weights with scales of their own, found by search (search.py).

    Q4_0, Q5_0:  x = d·(c - 8) and d·(c - 16)        Q4_1, Q5_1:  x = d·c + m

A block has d, and m, as float16, the fifth bits of its codes in 4 bytes where they have five, and the lower four bits:
of codes k and k + 16 in byte k (`block_q4_0` to `block_q5_1` of ggml-common.h).
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.quantize.search import affine, compiled, symmetric

GROUP = 32


def quantize_small(rows: NDArray[np.float32], bits: int, *, has_minimum: bool) -> NDArray[np.uint8]:
    """Returns blocks [n, width / 32 · bytes] of finite rows [n, width], with codes of 4 or 5 bits."""
    x = rows.reshape(-1, GROUP)
    numbers = np.empty((len(x), 1 + has_minimum), dtype=np.float32)
    _search(x, bits, numbers)
    rounded = numbers.astype(np.float16)
    header = 2 * rounded.shape[1]
    blocks = np.zeros((len(x), header + 4 * (bits - 4) + GROUP // 2), dtype=np.uint8)
    blocks[:, :header] = rounded.view(np.uint8)
    _encode(x, bits, rounded.astype(np.float32), header, blocks)
    return blocks.reshape(len(rows), -1)


@compiled
def _search(x, bits, numbers):  # type: ignore[no-untyped-def]
    weight = np.empty(GROUP, dtype=np.float32)
    for block in range(x.shape[0]):
        if numbers.shape[1] == 2:
            scale, minimum = affine(x[block], weight, 2**bits - 1, np.float32(np.inf))
            numbers[block, 0], numbers[block, 1] = scale, minimum
        else:
            numbers[block, 0] = symmetric(x[block], 2 ** (bits - 1))


@compiled
def _encode(x, bits, numbers, header, blocks):  # type: ignore[no-untyped-def]
    low = header + 4 * (bits - 4)
    top = np.float32(2**bits - 1)
    for block in range(x.shape[0]):
        scale = numbers[block, 0]
        # Without a minimum the middle code is 0.
        minimum = numbers[block, 1] if numbers.shape[1] == 2 else -scale * np.float32(2 ** (bits - 1))
        inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
        for k in range(GROUP):
            code = np.uint8(min(max(np.rint((x[block, k] - minimum) * inverse), np.float32(0)), top))
            blocks[block, low + k % 16] |= (code & 15) << (4 * (k // 16))
            if bits == 5:
                blocks[block, header + k // 8] |= (code >> 4) << (k % 8)
