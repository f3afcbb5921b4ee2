"""Quantises a matrix some rows at a time, so that no more than these are ever float32 beside it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.memory import in_parts
from patchclamp_server.cpu.quantize.q4_k import quantize_q4_k
from patchclamp_server.cpu.quantize.q6_k import quantize_q6_k
from patchclamp_server.cpu.quantize.small_blocks import quantize_small
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

# So many weights are float32 at once in each thread: they stay in its cache.
_AT_ONCE = 1 << 17


def _quantize_q8_0(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """With 8 bits the scale by the largest weight leaves nothing to find."""
    # Machines that serve other models may not have this.
    from gguf import GGMLQuantizationType, quantize

    return quantize(rows, GGMLQuantizationType.Q8_0)


QUANTIZERS: dict[Format, Callable[[NDArray[np.float32]], NDArray[np.uint8]]] = {
    Format.Q4_K: quantize_q4_k,
    Format.Q6_K: quantize_q6_k,
    Format.Q4_0: partial(quantize_small, bits=4, has_minimum=False),
    Format.Q5_0: partial(quantize_small, bits=5, has_minimum=False),
    Format.Q4_1: partial(quantize_small, bits=4, has_minimum=True),
    Format.Q5_1: partial(quantize_small, bits=5, has_minimum=True),
    Format.Q8_0: _quantize_q8_0,
}


class Quantized(NamedTuple):
    """`error` is Σ (x' - x)² and `squares` is Σ x², over all weights x and what became of them x'."""

    matrix: StoredMatrix
    error: float
    squares: float


def quantize_matrix(matrix: StoredMatrix, format: Format) -> Quantized:
    """Returns the matrix in blocks of `format`, one of QUANTIZERS, by all threads of torch.

    Raises ValueError, with the row, for a weight that is not finite or too large for a float16 scale, and where rows
    are not made of whole blocks.
    """
    n, width = matrix.shape
    size, step = format.row_bytes(width), max(1, _AT_ONCE // width)
    blocks = np.empty((n, size), dtype=np.uint8)
    sums = np.zeros((n, 2))
    first = 0
    for part in matrix.parts:
        own = slice(first, first + len(part.starts))
        work = partial(_quantize_part, part, format, step, first, blocks[own], sums[own])
        in_parts(work, len(part.starts), step, n * width * 4)
        first += len(part.starts)
    error, squares = sums.sum(axis=0).tolist()
    return Quantized(StoredMatrix((Part.whole(format, blocks.reshape(-1), width),)), error, squares)


def _quantize_part(
    part: Part,
    format: Format,
    step: int,
    first: int,
    blocks: NDArray[np.uint8],
    sums: NDArray[np.float64],
    start: int,
    end: int,
) -> None:
    """Writes the blocks and the sums of rows start ≤ r < end of a part, whose row 0 is row `first` of the matrix."""
    for at in range(start, end, step):
        rows = np.arange(at, min(end, at + step))
        x = part.reordered(rows).dense()
        _check(x, first + at, "is not finite")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            blocks[rows] = QUANTIZERS[format](x)
            left = Part.whole(format, blocks[rows].reshape(-1), part.width).dense()
        _check(left, first + at, f"is too large for the float16 scales of {format.name}")
        left -= x
        sums[rows, 0] = np.einsum("ij,ij->i", left, left, dtype=np.float64)
        sums[rows, 1] = np.einsum("ij,ij->i", x, x, dtype=np.float64)


def _check(x: NDArray[np.float32], first: int, fault: str) -> None:
    finite = np.isfinite(x)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"weight [{first + row}, {column}] {fault}")
