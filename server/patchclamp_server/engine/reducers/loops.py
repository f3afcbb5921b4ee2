"""What reducers do with rows on a CPU: loops that numba compiles, one pass over the rows each.

x [n, width] float32, contiguous. What is kept is changed in place. `warm_up` has all of them compiled before a step
waits for that.
"""

# What numba compiles has no types for mypy.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_compiled = numba.njit(nogil=True, cache=True)


def array_of(rows: Tensor) -> NDArray[np.float32]:
    """Rows on the CPU as the loops take them; shared with the tensor where it is so already."""
    found: NDArray[np.float32] = rows.float().contiguous().numpy()
    return found


def warm_up() -> None:
    """Compiles the loops, or reads them from the disk."""
    x, ids = np.zeros((1, 1), dtype=np.float32), np.zeros(1, dtype=np.int64)
    counts, table = np.zeros(1, dtype=np.int64), np.zeros((1, 1), dtype=np.int64)
    threshold = np.float32(0)
    count_above(x, threshold, counts)
    count_beyond(x, threshold, counts)
    count_by_bin(x, threshold, ids, table)
    add_moments(x, np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.float32))
    keep_largest(x, 0, 0, x.copy(), table, table.copy())
    ones = (counts, counts.copy(), counts.copy(), 1, 1.0, 1, 0.5)
    count_keys(x, threshold, False, ids, *ones, table, table.copy(), table.copy())


@_compiled
def count_above(x, threshold, counts):
    """counts_i += Σ [x_i > θ]"""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            counts[i] += np.int64(x[row, i] > threshold)


@_compiled
def count_beyond(x, threshold, counts):
    """counts_i += Σ [|x_i| > θ]"""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            counts[i] += np.int64(abs(x[row, i]) > threshold)


@_compiled
def count_by_bin(x, threshold, bins, counts):
    """counts_bi += Σ [x_i > θ] over the rows of bin b"""
    for row in range(x.shape[0]):
        own = counts[bins[row]]
        for i in range(x.shape[1]):
            own[i] += np.int64(x[row, i] > threshold)


@_compiled
def add_moments(x, total, squares, largest):
    """Σ x_i and Σ x_i² in float64, and max x_i"""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            v = np.float64(x[row, i])
            total[i] += v
            squares[i] += v * v
        for i in range(x.shape[1]):
            largest[i] = max(largest[i], x[row, i])


@_compiled
def keep_largest(x, text, start, values, texts, positions):
    """Of the k [width, k] values of each unit, descending, the last gives way to a larger one. Of equal values the
    earlier text goes first, and in a text the earlier position."""
    k = values.shape[1]
    least = values[:, k - 1].copy()
    units = np.empty(x.shape[1] + 1, dtype=np.int64)
    for row in range(x.shape[0]):
        position = start + row
        # The units that may change, written down without a jump that no processor foresees.
        n = 0
        for i in range(x.shape[1]):
            units[n] = i
            n += int(x[row, i] >= least[i])
        for i in units[:n]:
            v = x[row, i]
            at = k
            while at > 0 and (
                values[i, at - 1] < v
                or (
                    values[i, at - 1] == v
                    and (texts[i, at - 1] > text or (texts[i, at - 1] == text and positions[i, at - 1] > position))
                )
            ):
                at -= 1
            if at == k:
                continue
            for j in range(k - 1, at, -1):
                values[i, j], texts[i, j], positions[i, j] = values[i, j - 1], texts[i, j - 1], positions[i, j - 1]
            values[i, at], texts[i, at], positions[i, at] = v, text, position
            least[i] = values[i, k - 1]


@_compiled
def count_keys(
    x,
    threshold,
    magnitude,
    keys,
    rows,
    firings,
    let_go,
    least_rows,
    most_rate,
    least_firings,
    least_share,
    kept,
    counts,
    errors,
):
    """Space-Saving of the keys with which each unit fires, see top_keys.py. keys [n], -1: none; kept, counts, errors
    [width, k]."""
    k = kept.shape[1]
    live = np.flatnonzero(let_go == 0)
    units = np.empty(len(live) + 1, dtype=np.int64)
    for row in range(x.shape[0]):
        key = keys[row]
        if key < 0:
            continue
        rows[0] += 1
        # As above; of the units that are left, which soon are few.
        n = 0
        for i in live:
            v = abs(x[row, i]) if magnitude else x[row, i]
            units[n] = i
            n += int(v > threshold)
        for i in units[:n]:
            if let_go[i]:
                continue
            firings[i] += 1
            if rows[0] >= least_rows and firings[i] > most_rate * rows[0]:
                let_go[i] = 1
                continue
            found, least = -1, 0
            for j in range(k):
                if kept[i, j] == key:
                    found = j
                    break
                if counts[i, j] < counts[i, least]:
                    least = j
            if found < 0:
                found = least
                kept[i, found] = key
                errors[i, found] = counts[i, found]
            counts[i, found] += 1
            if least_share > 0 and firings[i] % least_firings == 0 and counts[i].max() < least_share * firings[i]:
                let_go[i] = 1
