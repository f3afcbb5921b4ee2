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
from patchclamp_server.cpu.sparse.codes import Codes, codes_of
from patchclamp_server.cpu.sparse.kernels import sum_code_records, sum_compact_codes, sum_float_rows
from patchclamp_server.cpu.sparse.output_rows import Floats, Index, as_array
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import LANES, UNIT


class InputRows(Protocol):
    @property
    def bytes_to_take(self) -> int:
        """The bytes that `take` would copy for all inputs."""
        ...

    def sum(self, factors: Floats, index: Index) -> Floats:
        """Returns y [T, out] of factors [T, K] and index [K]."""
        ...

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        """Returns `sum` for an index that stays the same."""
        ...


def input_rows(linear: Linear) -> InputRows:
    """Returns the inputs of a projection on the CPU. Of stored weights this is a copy with the same values: codes, and
    floats where there are no codes for them."""
    matrix = linear.matrix
    if matrix is None:
        return FloatInputRows(as_array(linear.dense().t()))
    codes = codes_of(matrix.parts[0]) if len(matrix.parts) == 1 else None
    if codes is not None:
        return CodeInputRows.of(codes)
    dense = linear.dense()
    if all(part.format is Format.BF16 for part in matrix.parts):
        dense = dense.bfloat16()
    return FloatInputRows(as_array(dense.t()))


@dataclass(frozen=True, eq=False)
class FloatInputRows:
    """Holds the matrix input-major: without a copy where the projection is, with one otherwise."""

    weight: NDArray[Any]  # [in, out]

    @property
    def bytes_to_take(self) -> int:
        return 0

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

    A scale and low belong to an output and a group of inputs, so that those of a group are read when one of its inputs
    is.
    """

    records: NDArray[Any]  # [in, bytes]
    scales: NDArray[np.float32]  # [groups, scale and low, out filled up to units]
    step: int  # elements that hold a unit of codes
    out: int
    group: int

    @classmethod
    def of(cls, codes: Codes) -> "CodeInputRows":
        out, width = codes.codes.shape
        units = -(-out // UNIT)
        columns = np.zeros((width, units * UNIT), dtype=codes.codes.dtype)
        columns[:, :out] = codes.codes.T
        if codes.lows is not None:
            halves = columns.reshape(width, units, 2, LANES)
            columns = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(width, units * LANES)
        records = aligned_records(*columns.shape)
        records[:, : columns.shape[1]] = columns.view(np.uint8)
        scales = np.zeros((codes.scales.shape[1], 2, units * UNIT), dtype=np.float32)
        scales[:, 0, :out] = codes.scales.T
        if codes.lows is not None:
            scales[:, 1, :out] = codes.lows.T
        return cls(records.view(columns.dtype), scales, columns.shape[1] // units, out, codes.group)

    @property
    def bytes_to_take(self) -> int:
        return self.records.nbytes

    def sum(self, factors: Floats, index: Index) -> Floats:
        y = np.zeros((len(factors), self.scales.shape[2]), dtype=np.float32)
        for row, out in zip(factors, y, strict=True):
            sum_code_records(self.records, self.step, self.group, self.scales, row, index, out)
        return np.ascontiguousarray(y[:, : self.out])

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        """Sums from a compact copy of the codes in the order in which they are read; the scales are shared."""
        groups, sizes = np.unique(index // self.group, return_counts=True)
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
