"""A low-bit copy of a matrix, W ≈ scale · code + low by groups, and its product with few rows on a CPU.

`LowBitOutputs` reads all of a matrix whose groups are of inputs; `LowBitInputs` reads, of a matrix whose groups are of
outputs, the inputs that are not 0. A sketch (sparsity/sketch.py) is used both ways.

Codes lie in words of 32 bits (fields.py): ten of 3 bits, and two bits to spare. So a weight of 3 bits in groups of 64
takes 4 bits, its share of a bfloat16 scale and low included. Least milliseconds for the gate and up of d 4096, d_ff
14336, on one thread: 4.3; with the fields shifted into place 5.2, and with rows of codes as in output_rows.py 8.4.

Rows are computed one by one: none depends on its neighbours. The number of threads does not change bits.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.model.sparse.fields import (
    WORD,
    multiply_fields,
    spread,
    sum_fields,
    unpack_inputs,
    unpack_outputs,
)
from patchclamp_server.model.sparse.memory import aligned_records, in_parts
from patchclamp_server.model.sparse.output_rows import Floats, as_floats
from patchclamp_server.model.sparse.vector import LANES

# Inputs that are summed into one partial sum, by one thread.
_INPUTS_OF_A_PART = 1024


@dataclass(frozen=True, eq=False)
class LowBitOutputs:
    """words [out / 16, groups, vectors, 16], scales [out / 16, groups, scale and low, 16]."""

    bits: int
    words: NDArray[np.int32]
    scales: NDArray[np.uint16]
    out: int
    width: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, low: Tensor, bits: int) -> "LowBitOutputs":
        """codes [out, in] uint8, scale and low [out, groups] that bfloat16 holds."""
        out, width = codes.shape
        groups, blocks = scale.shape[1], _whole(out, LANES)
        group, per_word = width // groups, WORD // bits
        vectors = _whole(group, per_word)
        fields = torch.zeros(groups, vectors * per_word, blocks * LANES, dtype=torch.uint8)
        fields[:, :group, :out] = codes.view(out, groups, group).permute(1, 2, 0)
        words = _packed(fields.view(groups, vectors, per_word, blocks, LANES).permute(3, 0, 1, 4, 2), bits)
        scales = torch.zeros(groups, 2, blocks * LANES, dtype=torch.bfloat16)
        scales[:, :, :out] = torch.stack((scale.t(), low.t()), dim=1)
        by_block = scales.view(groups, 2, blocks, LANES).permute(2, 0, 1, 3).contiguous()
        return cls(bits, words, by_block.view(torch.uint16).numpy(), out, width)

    @staticmethod
    def bits_per_weight(bits: int, group: int) -> float:
        return (WORD * _whole(group, WORD // bits) + 2 * 16) / group

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] -> x Wᵀ [T, out] float32."""
        _, groups, vectors, _ = self.words.shape
        spread_x = np.zeros(groups * vectors * (WORD // self.bits), dtype=np.float32)
        sums = np.empty(groups, dtype=np.float32)
        y = np.empty((len(x), len(self.words) * LANES), dtype=np.float32)
        for row, out in zip(as_floats(x), y, strict=True):
            spread(row, self.width // groups, vectors, self.bits, spread_x, sums)
            work = partial(multiply_fields, self.words, self.scales, spread_x, sums, self.bits, out)
            in_parts(work, len(self.words), 4, self.words.nbytes)
        return torch.from_numpy(np.ascontiguousarray(y[:, : self.out]))

    def matrix(self) -> Tensor:
        """Wᵀ [in, out] float32."""
        columns = np.empty((self.width, len(self.words) * LANES), dtype=np.float32)
        unpack_outputs(self.words, _floats(self.scales), self.width // self.words.shape[1], self.bits, columns)
        return torch.from_numpy(columns)[:, : self.out]


@dataclass(frozen=True, eq=False)
class LowBitInputs:
    """words [in, vectors · 16], scales [in, scale and low, groups]. The matrix W is input-major, [in, out].

    The outputs of a group are `blocks` of 16, the last filled up; fields.py says where a block lies.
    """

    bits: int
    words: NDArray[np.int32]
    scales: NDArray[np.uint16]
    groups: int
    group: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, low: Tensor, bits: int) -> "LowBitInputs":
        """codes [in, out] uint8, scale and low [in, groups] that bfloat16 holds."""
        n, out = codes.shape
        groups, per_word = scale.shape[1], WORD // bits
        group = out // groups
        blocks, steps = _whole(group, LANES), _whole(groups, per_word)
        fields = torch.zeros(n, per_word * steps, blocks * LANES, dtype=torch.uint8)
        fields[:, :groups, :group] = codes.view(n, groups, group)
        packed = _packed(fields.view(n, per_word, steps * blocks * LANES).transpose(1, 2), bits)
        words = aligned_records(n, packed.shape[1] * 4).view(np.int32)
        words[:] = packed
        scales = torch.zeros(n, 2, _whole(per_word * steps, LANES) * LANES, dtype=torch.bfloat16)
        scales[:, 0, :groups], scales[:, 1, :groups] = scale, low
        return cls(bits, words, scales.view(torch.uint16).numpy(), groups, group)

    @staticmethod
    def bits_per_weight(bits: int, group: int, out: int) -> float:
        per_word = WORD // bits
        slots = per_word * _whole(out // group, per_word)
        words = slots // per_word * _whole(group, LANES) * LANES * WORD
        return (words + 2 * 16 * _whole(slots, LANES) * LANES) / out

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] -> x W [T, out] float32. Where x is 0, nothing is read."""
        return torch.stack([self._sum(row) for row in as_floats(x)])

    def matrix(self) -> Tensor:
        """W [in, out] float32."""
        rows = np.empty((len(self.words), self.groups, self.group), dtype=np.float32)
        unpack_inputs(self.words, _floats(self.scales), self._blocks, self.bits, rows)
        return torch.from_numpy(rows).flatten(1)

    @property
    def _blocks(self) -> int:
        return _whole(self.group, LANES)

    def _sum(self, x: Floats) -> Tensor:
        index = x.nonzero()[0]
        factors = x[index]
        parts = _whole(len(index), _INPUTS_OF_A_PART)
        slots = self.words.shape[1] // LANES // self._blocks * (WORD // self.bits)
        y = np.zeros((parts, slots * self._blocks * LANES), dtype=np.float32)

        def work(first: int, last: int) -> None:
            for part in range(first, last):
                start = part * _INPUTS_OF_A_PART
                end = min(len(index), start + _INPUTS_OF_A_PART)
                sum_fields(self.words, self.scales, factors, index, self._blocks, self.bits, y[part], start, end)

        in_parts(work, parts, 1, len(index) * self.words.shape[1] * 4)
        total = torch.from_numpy(y.sum(0)).view(slots, -1)
        return total[: self.groups, : self.group].flatten()


def _whole(n: int, size: int) -> int:
    """How many of `size` it takes to hold n."""
    return -(-n // size)


def _packed(fields: Tensor, bits: int) -> NDArray[np.int32]:
    """[..., fields of a word] uint8 -> [...]"""
    words = torch.zeros(fields.shape[:-1], dtype=torch.int32)
    for k in range(fields.shape[-1]):
        words |= fields[..., k].int() << (bits * k)
    return words.numpy()


def _floats(scales: NDArray[np.uint16]) -> Floats:
    floats: Floats = torch.from_numpy(scales).view(torch.bfloat16).float().numpy()
    return floats
