"""Group-quantised weights are found and kept without loss, for decoding one or two rows on a CPU.

A model that comes from a GGUF file is a float32 matrix whose groups of 32 inputs hold few distinct values:
w = scale * code + low. Decoding one token reads every weight once, so its time is the bytes read; codes are a quarter
or an eighth of the float32 bytes. `recover` finds scale, low and codes again and proves them by reconstruction; it
leaves other matrices alone. Products accumulate in float32, as the float32 matrix would:

    y_o = Σ_g scale_og Σ_k code_ogk x_gk + low_og Σ_k x_gk

The formats are GGML Q4_1 (4-bit codes between the least and the largest weight of a group) and Q8_0 (8-bit codes,
symmetric).
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP = 32
# So many output rows lie side by side in a layout: one vector register of float32 (AVX-512).
LANES = 16
# This is the largest error of a reconstructed weight, in units of the largest weight of its group: float32 rounding.
TOLERANCE = 5e-7


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Holds codes [out / 16, groups, 16 or 32, 16 lanes], and scale and low [out / 16, groups, 2, 16 lanes].

    With 4 bits, byte k of a group holds code k in its low and code k + 16 in its high half. With 8 bits, codes are
    signed and low is 0.
    """

    bits: int
    codes: NDArray[Any]
    scale_and_low: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.codes.shape[0] * LANES, self.codes.shape[1] * GROUP

    def multiply(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ [T, out] of x [T, in] float32 on the CPU."""
        out = torch.empty((x.shape[0], self.codes.shape[0] * LANES), dtype=torch.float32)
        product = _multiply_4 if self.bits == 4 else _multiply_8
        product(self.codes, self.scale_and_low, x.contiguous().numpy(), out.numpy())
        return out

    def rows(self, start: int, end: int) -> Tensor:
        """The weights of outputs start ≤ o < end, both multiples of 16: [end - start, in] float32."""
        assert start % LANES == 0
        assert end % LANES == 0
        blocks = slice(start // LANES, end // LANES)
        weights = self._weights(self.codes[blocks], self.scale_and_low[blocks])  # [blocks, groups, 32, lanes]
        return weights.permute(0, 3, 1, 2).reshape(end - start, -1)

    def chosen(self, outputs: Tensor) -> Tensor:
        """The weights of outputs [n], in any order: [n, in] float32."""
        blocks, lanes = (outputs // LANES).numpy(), (outputs % LANES).numpy()
        codes, scale_and_low = (own[blocks, :, :, lanes][..., None] for own in (self.codes, self.scale_and_low))
        return self._weights(codes, scale_and_low).reshape(len(outputs), self.shape[1])

    def _weights(self, codes: NDArray[Any], scale_and_low: NDArray[Any]) -> Tensor:
        """Returns weights [blocks, groups, 32, lanes] of codes [blocks, groups, 16 or 32, lanes]."""
        own = torch.from_numpy(codes)
        scale, low = torch.from_numpy(scale_and_low).unsqueeze(3).unbind(2)
        if self.bits == 4:
            own = torch.cat((own & 15, own >> 4), dim=2)
        return torch.addcmul(low, own.float(), scale)


def recover(weight: Tensor) -> QuantizedWeight | None:
    """Returns the quantised form of `weight` [out, in] float32, or None when it has none."""
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
        return QuantizedWeight(4, _lanes(packed), _lanes(torch.cat((scale, low), dim=2)))

    scale = largest / 127
    codes = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    if bool(((codes * scale - groups).abs() <= TOLERANCE * largest).all()):
        return QuantizedWeight(8, _lanes(codes.to(torch.int8)), _lanes(torch.cat((scale, scale * 0), dim=2)))
    return None


def _lanes(values: Tensor) -> NDArray[Any]:
    """Arranges [out, groups, n] as a contiguous [out / 16, groups, n, 16]."""
    out, groups, n = values.shape
    return values.view(out // LANES, LANES, groups, n).permute(0, 2, 3, 1).contiguous().numpy()


# The inner loops have constant bounds: LLVM unrolls the one over k and makes the one over lanes a vector.


@numba.njit(fastmath=True, nogil=True, cache=True)
def _multiply_4(codes, scale_and_low, x, y):  # type: ignore[no-untyped-def]
    groups = codes.shape[1]
    sums = np.empty(groups, dtype=np.float32)
    for row in range(x.shape[0]):
        for g in range(groups):
            sums[g] = 0
            for k in range(GROUP):
                sums[g] += x[row, g * GROUP + k]
        for block in range(codes.shape[0]):
            y[row, block * LANES : block * LANES + LANES] = 0
            for g in range(groups):
                for lane in range(LANES):
                    total = np.float32(0)
                    for k in range(GROUP // 2):
                        byte = np.int32(codes[block, g, k, lane])
                        # int32 is explicit, because numba widens to 64 bits, which halves the lanes of a register.
                        total += np.float32(np.int32(byte & 15)) * x[row, g * GROUP + k]
                        total += np.float32(np.int32(byte >> 4)) * x[row, g * GROUP + GROUP // 2 + k]
                    scaled = scale_and_low[block, g, 0, lane] * total + scale_and_low[block, g, 1, lane] * sums[g]
                    y[row, block * LANES + lane] += scaled


@numba.njit(fastmath=True, nogil=True, cache=True)
def _multiply_8(codes, scale_and_low, x, y):  # type: ignore[no-untyped-def]
    for row in range(x.shape[0]):
        for block in range(codes.shape[0]):
            y[row, block * LANES : block * LANES + LANES] = 0
            for g in range(codes.shape[1]):
                for lane in range(LANES):
                    total = np.float32(0)
                    for k in range(GROUP):
                        total += np.float32(codes[block, g, k, lane]) * x[row, g * GROUP + k]
                    y[row, block * LANES + lane] += scale_and_low[block, g, 0, lane] * total
