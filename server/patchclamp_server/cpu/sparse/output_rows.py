"""These are products with chosen rows of W [out, in]: y_i = W[index_i] · x. Rows that are not chosen are not read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.memory import aligned_records, in_parts
from patchclamp_server.cpu.quantized import GROUP, LANES, QuantizedWeight
from patchclamp_server.cpu.sparse.kernels import dot_code_records, dot_float_rows

Floats = NDArray[np.float32]
Index = NDArray[np.int64]


class OutputRows(Protocol):
    def dot(self, x: Floats, index: Index) -> Floats:
        """Returns y [T, K] of x [T, in] and index [K]."""
        ...

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        """Returns `dot` for an index that stays the same."""
        ...

    def leading(self, n: int) -> Callable[[Floats], Floats]:
        """Returns the product with the first n rows."""
        ...


def output_rows(linear: Linear) -> OutputRows:
    """Returns the rows of a projection on the CPU."""
    if linear.quantized is not None:
        return CodeOutputRows.of(linear.quantized)
    assert linear.weight is not None
    return FloatOutputRows(as_array(linear.weight))


def linear_shape(linear: Linear) -> tuple[int, int]:
    """Returns (out, in) of a projection."""
    if linear.weight is not None:
        return linear.weight.shape[0], linear.weight.shape[1]
    assert linear.quantized is not None
    blocks, groups, _, lanes = linear.quantized.codes.shape
    return blocks * lanes, groups * GROUP


def as_floats(x: torch.Tensor) -> Floats:
    """Returns x as contiguous float32."""
    floats: Floats = x.detach().float().contiguous().numpy()
    return floats


def as_array(weight: torch.Tensor) -> NDArray[Any]:
    """Returns the memory of a float32 or bfloat16 matrix, the latter as uint16."""
    if weight.dtype == torch.bfloat16:
        weight = weight.view(torch.uint16)
    else:
        assert weight.dtype == torch.float32
    return weight.detach().contiguous().numpy()


@dataclass(frozen=True, eq=False)
class FloatOutputRows:
    """Holds the matrix without a copy: its rows are long, and are read as fast in place as from a compact copy."""

    weight: NDArray[Any]  # [out, in]

    def dot(self, x: Floats, index: Index) -> Floats:
        y = np.empty((len(x), len(index)), dtype=np.float32)
        size = len(index) * self.weight.shape[1] * self.weight.itemsize
        for row, out in zip(x, y, strict=True):
            in_parts(partial(dot_float_rows, self.weight, row, index, out), len(index), 4, size)
        return y

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        return lambda x: self.dot(x, index)

    def leading(self, n: int) -> Callable[[Floats], Floats]:
        return self.take(np.arange(n))


@dataclass(frozen=True, eq=False)
class CodeOutputRows:
    """Copies codes, scales and lows so that those of an output lie side by side; keeps the dense ones."""

    quantized: QuantizedWeight
    records: NDArray[Any]  # [out, bytes]
    header: int  # bytes of a record that are its scales and lows

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> "CodeOutputRows":
        codes = _rows(quantized.codes).reshape(-1, quantized.codes.shape[1] * quantized.codes.shape[2])
        scales = _rows(quantized.scale_and_low).transpose(0, 2, 1)[:, : 2 if quantized.bits == 4 else 1]
        header = np.ascontiguousarray(scales).reshape(len(codes), -1).view(np.uint8)
        records = aligned_records(len(codes), header.shape[1] + codes.shape[1])
        records[:, : header.shape[1]] = header
        records[:, header.shape[1] : header.shape[1] + codes.shape[1]] = codes.view(np.uint8)
        return cls(quantized, records.view(codes.dtype), header.shape[1])

    def dot(self, x: Floats, index: Index) -> Floats:
        y = np.empty((len(x), len(index)), dtype=np.float32)
        for row, out in zip(x, y, strict=True):
            dot_code_records(self.records, self.header, row, index, out)
        return y

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        """Multiplies by a compact copy in the layout of the dense product, which then does the work."""
        codes, scale_and_low = self.quantized.codes, self.quantized.scale_and_low
        return self._product(_take_rows(codes, index), _take_rows(scale_and_low, index), len(index))

    def leading(self, n: int) -> Callable[[Floats], Floats]:
        """Multiplies by a part of what the dense product reads; a few more rows may be read."""
        blocks = -(-n // LANES)
        return self._product(self.quantized.codes[:blocks], self.quantized.scale_and_low[:blocks], n)

    def _product(self, codes: NDArray[Any], scale_and_low: NDArray[Any], n: int) -> Callable[[Floats], Floats]:
        part = QuantizedWeight(self.quantized.bits, codes, scale_and_low)
        whole = n == len(codes) * LANES

        def product(x: Floats) -> Floats:
            y: Floats = part.multiply(torch.from_numpy(x)).numpy()
            return y if whole else np.ascontiguousarray(y[:, :n])

        return product


def _rows(lanes: NDArray[Any]) -> NDArray[Any]:
    """Arranges [out / 16, groups, n, 16] as a contiguous [out, groups, n]."""
    blocks, groups, n, _ = lanes.shape
    return np.ascontiguousarray(lanes.transpose(0, 3, 1, 2)).reshape(blocks * LANES, groups, n)


def _take_rows(lanes: NDArray[Any], index: Index) -> NDArray[Any]:
    """Returns the rows of `index` in the same layout, padded to whole lanes with zeros."""
    _, groups, n, _ = lanes.shape
    taken = np.zeros((-(-len(index) // LANES) * LANES, groups, n), dtype=lanes.dtype)
    taken[: len(index)] = lanes[index // LANES, :, :, index % LANES]
    return np.ascontiguousarray(taken.reshape(-1, LANES, groups, n).transpose(0, 2, 3, 1))
