"""These products read only the rows of active neurons or channels.

Each is specialised by the element type of its array (vector.py says which format that is). They are compiled once and
cached on disk; numba's cache looks at this file alone, so a change in vector.py needs a
change here. NaN and infinities are values like any other, so no fast-math flag denies them.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, var-annotated"

import numba
import numpy as np

from patchclamp_server.cpu.vector import LINE, UNIT, add_code_rows, add_rows, dot_rows, prefetch

# The records of codes are asked for so many groups ahead: rows that are skipped end the processor's own prefetching.
_GROUPS_AHEAD = 2

_compiled = numba.njit(fastmath={"contract", "reassoc"}, nogil=True, cache=True)


@numba.njit(nogil=True, cache=True)
def strictly_ascending(index, end):  # type: ignore[no-untyped-def]
    """Returns whether `index` has only numbers below `end`, each once, in order."""
    before = -1
    for i in range(index.shape[0]):
        if index[i] <= before:
            return False
        before = index[i]
    return before < end


@_compiled
def dot_float_rows(weights, x, index, y, start, end):  # type: ignore[no-untyped-def]
    """Sets y[i] = weights[index[i]] · x for start ≤ i < end; weights [n, width] float32, or bfloat16 as uint16."""
    width = weights.shape[1]
    units = width // UNIT
    flat = weights.reshape(-1)
    for i in range(start, end, 4):
        # Past the end the last row is repeated, and not stored.
        a = index[i] * width
        b = index[min(i + 1, end - 1)] * width
        c = index[min(i + 2, end - 1)] * width
        d = index[min(i + 3, end - 1)] * width
        sums = dot_rows(flat, (a, b, c, d), x, units)
        for r in range(min(4, end - i)):
            total = sums[r]
            for k in range(units * UNIT, width):
                total += _as_float(weights[index[i + r], k]) * x[k]
            y[i + r] = total


@_compiled
def sum_float_rows(weights, factors, index, y, start, end):  # type: ignore[no-untyped-def]
    """Adds Σ_i factors[i] weights[index[i], k] to y[k] for start ≤ k < end. `start` is a multiple of 32."""
    width = weights.shape[1]
    units = (end - start) // UNIT
    flat = weights.reshape(-1)
    n = index.shape[0]
    whole = n - n % 4
    for i in range(0, whole, 4):
        a, b, c, d = index[i] * width, index[i + 1] * width, index[i + 2] * width, index[i + 3] * width
        at = (a + start, b + start, c + start, d + start)
        add_rows(flat, at, (factors[i], factors[i + 1], factors[i + 2], factors[i + 3]), y, start, units)
    for i in range(whole, n):
        add_rows(flat, (index[i] * width + start,), (factors[i],), y, start, units)
    for k in range(start + units * UNIT, end):
        for i in range(n):
            y[k] += factors[i] * _as_float(weights[index[i], k])


@numba.njit(nogil=True, cache=True, inline="always")
def _as_float(value):  # type: ignore[no-untyped-def]
    return _widen(value)


def _widen(value):  # type: ignore[no-untyped-def]
    raise NotImplementedError


@numba.extending.overload(_widen)
def _widen_by_format(value):  # type: ignore[no-untyped-def]
    if value == numba.types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@_compiled
def sum_code_records(records, step, group_size, scales, factors, index, y):  # type: ignore[no-untyped-def]
    """Adds Σ_i factors[i] (row index[i]) to y. A record is the codes of an input, padded to whole cache lines.

    A unit of codes has `step` elements. scales [groups, 2, width] has scale and low of each group of
    `group_size` rows and output; width is that of y.
    """
    size = records.shape[1]
    flat = records.reshape(-1)
    flat_scales = scales.reshape(-1)
    width = scales.shape[2]
    n = index.shape[0]
    offsets = index * size
    lines = (width // UNIT * step + LINE - 1) // LINE
    ahead = 0
    i = 0
    while i < n:
        group = index[i] // group_size
        total = np.float32(0)
        end = i
        while end < n and index[end] // group_size == group:
            total += factors[end]
            end += 1
        while ahead < n and index[ahead] // group_size <= group + _GROUPS_AHEAD:
            prefetch(flat, offsets[ahead], lines)
            ahead += 1
        at = group * 2 * width
        low = at + width
        add_code_rows(flat, offsets, i, end, step, factors, flat_scales, at, low, 2 * width, total, y, width // UNIT)
        i = end


@_compiled
def sum_compact_codes(codes, step, ends, groups, scales, factors, y):  # type: ignore[no-untyped-def]
    """Computes the sum of `sum_code_records` over all rows of a compact copy: part p has the rows before ends[p].

    codes are [units of outputs, rows of the part, codes of a unit], part by part, in the order in which they are read.
    """
    flat_scales = scales.reshape(-1)
    width = scales.shape[2]
    units = width // UNIT
    n = factors.shape[0]
    offsets = np.empty(n, dtype=np.int64)
    start = 0
    for part in range(groups.shape[0]):
        end = ends[part]
        total = np.float32(0)
        for r in range(start, end):
            total += factors[r]
            offsets[r] = start * units * step + (r - start) * step
        at = groups[part] * 2 * width
        row = (end - start) * step
        low = at + width
        add_code_rows(codes, offsets, start, end, row, factors, flat_scales, at, low, 2 * width, total, y, units)
        start = end


@numba.njit(nogil=True, cache=True)
def select_channels(x, scale, threshold, index):  # type: ignore[no-untyped-def]
    """Writes the channels whose |x| · scale is not below the threshold, and returns their number. A NaN is kept."""
    n = 0
    for k in range(x.shape[0]):
        score = abs(x[k]) * scale[k] if scale.shape[0] else abs(x[k])
        if not score < threshold:
            index[n] = k
            n += 1
    return n
