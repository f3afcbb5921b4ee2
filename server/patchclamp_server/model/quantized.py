"""Weights that are group-quantised, found and kept without loss, for decoding one or two rows on a CPU.

A model that comes from a GGUF file is a float32 matrix whose groups of 32 inputs hold few distinct values:
w = scale * code + low. Decoding one token reads every weight once, so its time is the bytes read; codes are a quarter
or an eighth of the float32 bytes. `recover` finds scale, low and codes again and proves them by reconstruction; a
matrix that is not quantised is left alone. Products accumulate in float32, as the float32 matrix would:

    y_o = Σ_g scale_og Σ_k code_ogk x_gk + low_og Σ_k x_gk

Formats: GGML Q4_1 (4-bit codes between the least and the largest weight of a group) and Q8_0 (8-bit codes, symmetric).
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP = 32
# Output rows side by side in a layout: one vector register of float32 (AVX-512).
LANES = 16
# Largest error of a reconstructed weight, in units of the largest weight of its group: float32 rounding.
TOLERANCE = 5e-7


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """codes [out / 16, groups, 16 or 32, 16 lanes]; scale and low [out / 16, groups, 16 lanes].

    4-bit: byte k of a group holds code k in its low and code k + 16 in its high half. 8-bit: signed codes, low is 0.
    """

    bits: int
    codes: NDArray[Any]
    scale: NDArray[Any]
    low: NDArray[Any]

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] float32 on the CPU -> [T, out]."""
        out = torch.empty((x.shape[0], self.codes.shape[0] * LANES), dtype=torch.float32)
        y, rows = out.numpy(), x.contiguous().numpy()
        for row in range(len(rows)):
            if self.bits == 4:
                _multiply_4(self.codes, self.scale, self.low, rows[row], y[row])
            else:
                _multiply_8(self.codes, self.scale, rows[row], y[row])
        return out


def recover(weight: Tensor) -> QuantizedWeight | None:
    """The quantised form of `weight` [out, in] float32, or None when it has none."""
    out, width = weight.shape
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or out % LANES or width % GROUP:
        return None
    groups = weight.view(out, width // GROUP, GROUP)
    largest = groups.abs().amax(2, keepdim=True)

    low = groups.amin(2, keepdim=True)
    scale = (groups.amax(2, keepdim=True) - low) / 15
    codes = ((groups - low) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    if bool(((codes * scale + low - groups).abs() <= TOLERANCE * largest).all()):
        nibbles = codes.to(torch.uint8)
        packed = nibbles[:, :, : GROUP // 2] | (nibbles[:, :, GROUP // 2 :] << 4)
        return QuantizedWeight(4, _lanes(packed), _lanes(scale)[:, :, 0], _lanes(low)[:, :, 0])

    scale = largest / 127
    codes = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    if bool(((codes * scale - groups).abs() <= TOLERANCE * largest).all()):
        scales = _lanes(scale)[:, :, 0]
        return QuantizedWeight(8, _lanes(codes.to(torch.int8)), scales, np.zeros_like(scales))
    return None


def _lanes(values: Tensor) -> NDArray[Any]:
    """[out, groups, n] -> [out / 16, groups, n, 16], contiguous."""
    out, groups, n = values.shape
    return values.view(out // LANES, LANES, groups, n).permute(0, 2, 3, 1).contiguous().numpy()


# The inner loops have constant bounds: LLVM unrolls the one over k and makes the one over lanes a vector.


@numba.njit(fastmath=True, nogil=True, cache=True)
def _multiply_4(codes, scale, low, x, y):  # type: ignore[no-untyped-def]
    sums = np.zeros(codes.shape[1], dtype=np.float32)
    for g in range(codes.shape[1]):
        for k in range(GROUP):
            sums[g] += x[g * GROUP + k]
    for block in range(codes.shape[0]):
        y[block * LANES : block * LANES + LANES] = 0
        for g in range(codes.shape[1]):
            for lane in range(LANES):
                total = np.float32(0)
                for k in range(GROUP // 2):
                    byte = np.int32(codes[block, g, k, lane])
                    # Explicit int32: numba widens to 64 bits, which halves the lanes of a register.
                    total += np.float32(np.int32(byte & 15)) * x[g * GROUP + k]
                    total += np.float32(np.int32(byte >> 4)) * x[g * GROUP + GROUP // 2 + k]
                y[block * LANES + lane] += scale[block, g, lane] * total + low[block, g, lane] * sums[g]


@numba.njit(fastmath=True, nogil=True, cache=True)
def _multiply_8(codes, scale, x, y):  # type: ignore[no-untyped-def]
    for block in range(codes.shape[0]):
        y[block * LANES : block * LANES + LANES] = 0
        for g in range(codes.shape[1]):
            for lane in range(LANES):
                total = np.float32(0)
                for k in range(GROUP):
                    total += np.float32(codes[block, g, k, lane]) * x[g * GROUP + k]
                y[block * LANES + lane] += scale[block, g, lane] * total
