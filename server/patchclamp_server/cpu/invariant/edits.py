"""Edits of rows as compiled loops: the formulas of interventions/kinds, with the bits that torch's operators give.

A pair is an edit and a row of x [T, width] that it changes; pairs run in their order. Beside x two numbers of each pair
are set, |delta| and |h|, with h as the edits before it in this call left it. A pair that is not open changes no row.
numba caches this by this file alone: a change in tiles.py or rows.py needs one here.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, var-annotated"

import math

import numba
import numpy as np

from patchclamp_server.cpu.invariant.tiles import dot

# What a pair turns its row into, by the names of interventions/kinds.
ADD, PROJECT, ROTATE = range(3)
# The sine of the least angle between a row and a vector that span a plane.
_LEAST_SINE = np.float32(1e-6)

# Zero divided by zero is NaN, as for torch.
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _norm(x):
    return np.sqrt(dot(x, 0, x, 0, x.shape[0]))


@_compiled
def _interpolate(start, end, share):
    distance = end - start
    if abs(share) < np.float32(0.5):
        return start + share * distance
    return end - distance * (np.float32(1) - share)


@_compiled
def _target(kind, h, norm, unit, low, high, target, scratch):
    """Sets target ← t(h)."""
    width = h.shape[0]
    if kind == ADD:
        for k in range(width):
            target[k] = h[k] + unit[k]
    elif kind == PROJECT:
        projection = dot(h, 0, unit, 0, width)
        # NaN stays.
        clipped = low if projection < low else projection
        clipped = high if clipped > high else clipped
        change = clipped - projection
        for k in range(width):
            target[k] = h[k] + change * unit[k]
    else:
        for k in range(width):
            target[k] = h[k] / norm
        cosine = dot(target, 0, unit, 0, width)
        for k in range(width):
            scratch[k] = unit[k] - cosine * target[k]
        sine = _norm(scratch)
        if not sine > _LEAST_SINE:
            target[:] = h
            return
        angle = min(np.float64(low), math.atan2(np.float64(sine), np.float64(cosine)))
        along, across = np.float32(math.cos(angle)), np.float32(math.sin(angle)) / sine
        for k in range(width):
            target[k] = (along * target[k] + across * scratch[k]) * norm


@_compiled
def edit_rows(kind, x, rows, which, vectors, low, high, strength, opened, preserve_norm, deltas, norms):
    """Sets x_r ← h + s (t(h) - h), rescaled to |h| with `preserve_norm`; vectors [k, width] of which[e]; others [E]."""
    width = x.shape[1]
    h, target, scratch = (np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32))
    for e in range(rows.shape[0]):
        row, share = x[rows[e]], strength[e]
        h[:] = row
        norm = _norm(h)
        norms[e], deltas[e] = norm, np.float32(0)
        if not opened[e] > 0:
            continue
        _target(kind, h, norm, vectors[which[e]], low[e], high[e], target, scratch)
        for k in range(width):
            target[k] = _interpolate(h[k], target[k], share)
        if preserve_norm and share != 0:
            reached = _norm(target)
            if reached != 0:
                scale = norm / reached
                for k in range(width):
                    target[k] *= scale
        for k in range(width):
            row[k] = target[k]
            scratch[k] = target[k] - h[k]
        deltas[e] = _norm(scratch)


@_compiled
def add_to_rows(x, rows, which, vectors, strength, opened, norms):
    """Sets x_r ← x_r + s v."""
    width = x.shape[1]
    for e in range(rows.shape[0]):
        row, vector, share = x[rows[e]], vectors[which[e]], strength[e]
        norms[e] = _norm(row)
        if opened[e] > 0:
            for k in range(width):
                row[k] += vector[k] * share


@_compiled
def edit_units(x, rows, starts, units, dim, factor, offset, low, high, strength, opened, deltas, norms):
    """Sets a ← a + s (clip(f a + c, low, high) - a) for the numbers a of units: `dim` of x_r from units[u] dim on.

    Pair e has units starts[e] ≤ u < starts[e + 1]; offset is [units, dim]. Without bounds, low and high are empty.
    """
    for e in range(rows.shape[0]):
        row, share = x[rows[e]], strength[e]
        norms[e] = _norm(row)
        squares = np.float32(0)
        if opened[e] > 0:
            for u in range(starts[e], starts[e + 1]):
                own = row[units[u] * dim : (units[u] + 1) * dim]
                for k in range(dim):
                    a = own[k]
                    target = offset[u, k] + a * factor[u]
                    if low.shape[0]:
                        target = low[u] if target < low[u] else target
                        target = high[u] if target > high[u] else target
                    edited = _interpolate(a, target, share)
                    own[k] = edited
                    squares += (edited - a) * (edited - a)
        deltas[e] = np.sqrt(squares)
