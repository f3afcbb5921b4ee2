"""Sums over chosen inputs of W [out, in] are y += Σ_i factors_i W[:, index_i]. Other inputs are not read.

The weights of an input lie side by side. Inputs are the neurons of a down projection, or the channels of any
projection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.memory import aligned_records, in_parts
from patchclamp_server.cpu.quantized import GROUP, LANES, QuantizedWeight
from patchclamp_server.cpu.sparse.kernels import sum_code_records, sum_compact_codes, sum_float_rows
from patchclamp_server.cpu.sparse.output_rows import Floats, Index, as_array
from patchclamp_server.cpu.vector import UNIT


class InputRows(Protocol):
    def sum(self, factors: Floats, index: Index) -> Floats:
        """Returns y [T, out] of factors [T, K] and index [K]."""
        ...

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        """Returns `sum` for an index that stays the same."""
        ...


def input_rows(linear: Linear) -> InputRows:
    """Returns the inputs of a projection on the CPU."""
    if linear.quantized is not None:
        return CodeInputRows.of(linear.quantized)
    assert linear.weight is not None
    return FloatInputRows(as_array(linear.weight.t()))


@dataclass(frozen=True, eq=False)
class FloatInputRows:
    """Holds the matrix input-major: without a copy where the projection is, with one otherwise."""

    weight: NDArray[Any]  # [in, out]

    def sum(self, factors: Floats, index: Index) -> Floats:
        y = np.zeros((len(factors), self.weight.shape[1]), dtype=np.float32)
        size = len(index) * self.weight.shape[1] * self.weight.itemsize
        for row, out in zip(factors, y, strict=True):
            in_parts(partial(sum_float_rows, self.weight, row, index, out), len(out), UNIT, size)
        return y

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        return lambda factors: self.sum(factors, index)


@dataclass(frozen=True, eq=False)
class CodeInputRows:
    """Holds a copy of the codes with those of an input side by side, in units of 32 outputs.

    A scale and low belong to an output and 32 inputs, so that those of a group are read when one of its inputs is.
    """

    records: NDArray[Any]  # [in, bytes]
    scales: NDArray[np.float32]  # [groups, scale and low, out filled up to units]
    step: int  # elements that hold a unit of codes
    out: int

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> "CodeInputRows":
        blocks, groups, _, _ = quantized.codes.shape
        out, units = blocks * LANES, -(-blocks * LANES // UNIT)
        codes = quantized.codes
        if quantized.bits == 4:
            codes = np.concatenate((codes & 15, codes >> 4), axis=2)
        columns = np.zeros((groups * GROUP, units * UNIT), dtype=codes.dtype)
        columns[:, :out] = codes.transpose(1, 2, 0, 3).reshape(groups * GROUP, out)
        if quantized.bits == 4:
            halves = columns.reshape(groups * GROUP, units, 2, LANES)
            columns = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(groups * GROUP, units * LANES)
        records = aligned_records(*columns.shape)
        records[:, : columns.shape[1]] = columns.view(np.uint8)
        scales = np.zeros((groups, 2, units * UNIT), dtype=np.float32)
        scales[:, :, :out] = quantized.scale_and_low.transpose(1, 2, 0, 3).reshape(groups, 2, out)
        return cls(records.view(codes.dtype), scales, columns.shape[1] // units, out)

    def sum(self, factors: Floats, index: Index) -> Floats:
        y = np.zeros((len(factors), self.scales.shape[2]), dtype=np.float32)
        for row, out in zip(factors, y, strict=True):
            sum_code_records(self.records, self.step, self.scales, row, index, out)
        return np.ascontiguousarray(y[:, : self.out])

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        """Sums from a compact copy of the codes in the order in which they are read; the scales are shared."""
        groups, sizes = np.unique(index // GROUP, return_counts=True)
        ends = np.cumsum(sizes)
        units = self.scales.shape[2] // UNIT
        rows = self.records[index, : units * self.step].reshape(-1, units, self.step)
        parts = [rows[start:end].transpose(1, 0, 2).reshape(-1) for start, end in zip(ends - sizes, ends, strict=True)]
        codes = np.concatenate(parts) if parts else np.empty(0, dtype=self.records.dtype)

        def total(factors: Floats) -> Floats:
            y = np.zeros((len(factors), self.scales.shape[2]), dtype=np.float32)
            for row, out in zip(factors, y, strict=True):
                sum_compact_codes(codes, self.step, ends, groups, self.scales, row, out)
            return np.ascontiguousarray(y[:, : self.out])

        return total
