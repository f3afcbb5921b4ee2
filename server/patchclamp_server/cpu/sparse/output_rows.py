"""These are products with chosen rows of W [out, in]: y_i = W[index_i] · x. Rows that are not chosen are not read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.sparse.kernels import dot_float_rows

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
    if linear.product is not None:
        return StoredOutputRows(linear.product)
    assert linear.weight is not None
    return FloatOutputRows(as_array(linear.weight))


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
class StoredOutputRows:
    """Reads stored rows where they lie: chosen ones are a part of the matrix, without a copy."""

    product: StoredProduct

    def dot(self, x: Floats, index: Index) -> Floats:
        return self.product.multiply_chosen(x, index)

    def take(self, index: Index) -> Callable[[Floats], Floats]:
        chosen = self.product.chosen(index)

        def product(x: Floats) -> Floats:
            y: Floats = chosen.multiply(torch.from_numpy(x)).numpy()
            return y

        return product

    def leading(self, n: int) -> Callable[[Floats], Floats]:
        return self.take(np.arange(n))
