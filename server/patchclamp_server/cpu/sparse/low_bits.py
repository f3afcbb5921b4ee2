"""A low-bit copy of W [out, in], W ≈ scale · code + low by groups of inputs, is multiplied with few rows.

It is for the CPU, and for a sketch (sparsity/policies/sketch.py). Codes lie in halves of words (fields.py): a word has
ten of 3 bits, and two bits to spare. A weight of 3 bits in groups of 64 takes 4 bits, its share of a bfloat16 scale and
low included.

x is rounded to 16 bits by groups, since then two weights are one multiplication: the error is at most 1 / 65534 of the
largest |x| of the group, where that of a code is some thousand times as large. For the gate and up of d 4096,
d_ff 14336 this takes 2.8 ms at least on one thread; tried were x in float32 with codes where they stand in a word (5.1)
and shifted (6.2), and rows of codes as in output_rows.py (8.4). The down projection takes 1.4 ms; half of its inputs,
gathered in a layout of their own with x in float32, took 2.1.

Rows are computed one by one: none depends on its neighbours. The number of threads does not change bits.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.sparse.fields import HALF, multiply_fields, round_groups, unpack_fields
from patchclamp_server.cpu.sparse.output_rows import Floats, as_floats
from patchclamp_server.cpu.vector import LANES


@dataclass(frozen=True, eq=False)
class LowBitMatrix:
    """Has words [out / 16, groups, vectors, 16] and scales [out / 16, groups, scale and low, 16]."""

    bits: int
    words: NDArray[np.int32]
    scales: NDArray[np.uint16]
    out: int
    width: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, low: Tensor, bits: int) -> "LowBitMatrix":
        """Packs codes [out, in] uint8 with scale and low [out, groups] that bfloat16 holds. `bits` is 2, 3, 4 or 8."""
        out, width = codes.shape
        groups, blocks, fields = scale.shape[1], _whole(out, LANES), HALF // bits
        group = width // groups
        vectors = _whole(group, 2 * fields)
        lanes = torch.zeros(groups, vectors * fields * 2, blocks * LANES, dtype=torch.uint8)
        lanes[:, :group, :out] = codes.view(out, groups, group).permute(1, 2, 0)
        by_word = lanes.view(groups, vectors, fields, 2, blocks, LANES).permute(4, 0, 1, 5, 2, 3)
        words = torch.zeros(by_word.shape[:4], dtype=torch.int32)
        for k in range(fields):
            for half in range(2):
                words |= by_word[..., k, half].int() << (bits * k + HALF * half)
        scales = torch.zeros(groups, 2, blocks * LANES, dtype=torch.bfloat16)
        scales[:, :, :out] = torch.stack((scale.t(), low.t()), dim=1)
        by_block = scales.view(groups, 2, blocks, LANES).permute(2, 0, 1, 3).contiguous()
        return cls(bits, words.numpy(), by_block.view(torch.uint16).numpy(), out, width)

    @staticmethod
    def bits_per_weight(bits: int, group: int) -> float:
        """Returns the bits of a weight, scales and lows included."""
        return (2 * HALF * _whole(group, 2 * (HALF // bits)) + 2 * 16) / group

    def multiply(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ [T, out] float32 of x [T, in]."""
        _, groups, vectors, _ = self.words.shape
        rounded = np.zeros((groups, vectors * (HALF // self.bits) * 2), dtype=np.int16)
        steps, sums = np.empty(groups, dtype=np.float32), np.empty(groups, dtype=np.float32)
        y = np.empty((len(x), len(self.words) * LANES), dtype=np.float32)
        for row, out in zip(as_floats(x), y, strict=True):
            round_groups(row, self.width // groups, rounded, steps, sums)
            pairs = rounded.reshape(-1).view(np.int32)
            work = partial(multiply_fields, self.words, self.scales, pairs, steps, sums, self.bits, out)
            in_parts(work, len(self.words), 4, self.words.nbytes)
        return torch.from_numpy(np.ascontiguousarray(y[:, : self.out]))

    def matrix(self) -> Tensor:
        """Returns Wᵀ [in, out] float32."""
        columns = np.empty((self.width, len(self.words) * LANES), dtype=np.float32)
        scales: Floats = torch.from_numpy(self.scales).view(torch.bfloat16).float().numpy()
        unpack_fields(self.words, scales, self.width // self.words.shape[1], self.bits, columns)
        return torch.from_numpy(columns)[:, : self.out]


def _whole(n: int, size: int) -> int:
    """Returns how many of `size` it takes to hold n."""
    return -(-n // size)
