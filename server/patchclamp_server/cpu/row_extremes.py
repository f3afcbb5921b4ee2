"""The k largest and the k smallest numbers of every row, in one pass over it.

torch.topk sorts parts of a copy of the row and has to be called twice. Here a number is compared with the k-th of both
sides so far; of n numbers in any order about k ln(n / k) get further. Compiled once and cached on disk.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="no-untyped-call, no-untyped-def"

from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.memory import in_parts


def row_extremes(rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the k largest of rows [n, width], the places of these, the k smallest, and the places of these.

    All are [n, k], the extreme first; of equal numbers the first in the row stands first. rows are float32 and
    finite, k is at most their width.
    """
    n, width = rows.shape
    assert 1 <= k <= width
    if rows.device.type != "cpu":
        largest, smallest = rows.topk(k, dim=1), rows.topk(k, dim=1, largest=False)
        return largest.values, largest.indices, smallest.values, smallest.indices
    values, places = np.empty((2, n, k), np.float32), np.zeros((2, n, k), np.int64)
    work = partial(_extremes, rows.contiguous().numpy(), k, values, places)
    in_parts(work, n, 1, rows.numel() * rows.element_size())
    top, bottom = (torch.from_numpy(both) for both in (values, places))
    return top[0], bottom[0], top[1], bottom[1]


@numba.njit(nogil=True, cache=True)
def _extremes(rows, k, values, places, start, end):
    for i in range(start, end):
        row = rows[i]
        top, top_at, bottom, bottom_at = values[0, i], places[0, i], values[1, i], places[1, i]
        top[:], bottom[:] = -np.inf, np.inf
        least, most = top[k - 1], bottom[k - 1]
        for j in range(row.shape[0]):
            v = row[j]
            if v > least:
                _insert(top, top_at, v, j, k, np.float32(1))
                least = top[k - 1]
            if v < most:
                _insert(bottom, bottom_at, v, j, k, np.float32(-1))
                most = bottom[k - 1]


@numba.njit(nogil=True, cache=True)
def _insert(values, places, v, at, k, sign):
    """Puts v behind all that are as extreme; the last of the k falls out."""
    place = k - 1
    while place > 0 and sign * values[place - 1] < sign * v:
        values[place], places[place] = values[place - 1], places[place - 1]
        place -= 1
    values[place], places[place] = v, at
