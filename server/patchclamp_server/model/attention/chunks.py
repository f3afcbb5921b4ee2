"""One chunk of keys for all queries of a tile that share a KV head: scores, weights and their sums of values.

numba compiles this and caches it on disk by this file alone: a change in cpu/invariant/attention.py or cpu/vector.py
needs one here, and a change here one in row_attention.py.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, var-annotated, assignment"

import math

import numba
import numpy as np

from patchclamp_server.cpu.invariant.attention import WIDE, add_values, exponentials_from, score_keys
from patchclamp_server.cpu.invariant.tiles import largest_of
from patchclamp_server.model.attention.parts import CHUNK, RECORD
from patchclamp_server.model.attention.pools import LANES

_TILES = CHUNK // LANES
# The numbers of a record, behind its sums of values.
LARGEST, TOTAL, REST, WHERE = range(4)

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled
def _together(n):
    """Returns how many of n queries that are left are computed at once."""
    return 8 if WIDE and n >= 8 else 4 if n >= 4 else n


@compiled
def pack_queries(q, row, rows, n_heads, first_head, group, dim, out):
    """Sets out to the queries of one KV head by those that are computed at once, [dim, at once] each."""
    n, v = rows * group, 0
    while v < n:
        r = _together(n - v)
        for k in range(v, v + r):
            at = ((row + k // group) * n_heads + first_head + k % group) * dim
            for d in range(dim):
                out[v * dim + d * r + k - v] = q[at + d]
        v += r


@compiled
def attend_chunk(
    queries, keys, values, key_at, value_at, coded, scales, tiles, sight, dim, width, scale, cap, scores, out, wanted
):  # fmt: skip
    """Sets the records `out` of n queries of a chunk: the sums of exp(s - largest) v, the largest score, the sum of
    exp(s - largest), the largest score behind the first key, and the place of the largest in the chunk. A query that
    sees none of its keys has a total of -1."""
    position, rows, group, window = sight
    n, record = rows * group, width + RECORD
    begin = (max(0, position - window + 1) if window else 0) // LANES
    _score(queries, n, keys, values, key_at, value_at, begin, tiles, dim, scale, scales, scores)
    for v in range(n):
        at = v * CHUNK
        last = min(position + v // group, CHUNK - 1)
        first = max(0, position + v // group - window + 1) if window else 0
        out[v * record : (v + 1) * record] = np.float32(0)
        numbers = out[v * record + width : (v + 1) * record]
        if last < first:
            numbers[TOTAL] = np.float32(-1)
            continue
        scores[at + begin * LANES : at + first] = np.float32(-np.inf)
        scores[at + last + 1 : at + tiles * LANES] = np.float32(-np.inf)
        if cap > 0:
            for j in range(at + first, at + last + 1):
                scores[j] = np.float32(math.tanh(scores[j] / cap)) * cap
        from_at, length = at + begin * LANES, (tiles - begin) * LANES
        if wanted[1] and first == 0:
            sink = scores[at]
            scores[at] = np.float32(-np.inf)
            rest = largest_of(scores, from_at, length)
            scores[at] = sink
            largest = sink if sink >= rest else rest
        else:
            largest = largest_of(scores, from_at, length)
            rest = largest
        if wanted[0]:
            j = first
            # If every score is NaN, no key equals the largest, and the search ends at `last`.
            while j < last and scores[at + j] != largest:
                j += 1
            numbers[WHERE] = np.float32(j)
        numbers[LARGEST], numbers[REST] = largest, rest
        # If there is no largest score, all weights are 0 or NaN.
        base = largest if largest > -np.inf else np.float32(0)
        numbers[TOTAL] = exponentials_from(scores, from_at, length, base)
        if coded:
            weights, own = scores[from_at : from_at + length], scales[CHUNK + begin * LANES : CHUNK + tiles * LANES]
            for j in range(length):
                weights[j] *= own[j]
    v = 0
    while v < n:
        r = 4 if n - v >= 4 else n - v
        low, high = v // group, (v + r - 1) // group
        # All of these queries see what lies between.
        begin_all = max(0, position + high - window + 1) if window else 0
        end_all = min(position + low, CHUNK - 1) + 1
        if r > 1 and end_all > begin_all:
            for k in range(v, v + r):
                begin_own = max(0, position + k // group - window + 1) if window else 0
                if begin_own < begin_all:
                    _add(scores, k, 1, values, value_at, begin_own, begin_all, width, out, keys, key_at)
            _add(scores, v, r, values, value_at, begin_all, end_all, width, out, keys, key_at)
            for k in range(v, v + r):
                end_own = min(position + k // group, CHUNK - 1) + 1
                if end_own > end_all:
                    _add(scores, k, 1, values, value_at, end_all, end_own, width, out, keys, key_at)
        else:
            for k in range(v, v + r):
                begin_own = max(0, position + k // group - window + 1) if window else 0
                end_own = min(position + k // group, CHUNK - 1) + 1
                if end_own > begin_own:
                    _add(scores, k, 1, values, value_at, begin_own, end_own, width, out, keys, key_at)
        v += r


@compiled
def _score(q, n, keys, values, key_at, value_at, begin, end, dim, scale, scales, scores):
    """Sets the scores of n queries for tiles begin ≤ t < end; those of others in fours of tiles mean nothing."""
    v = 0
    while v < n:
        r = _together(n - v)
        at, q_at = v * CHUNK, v * dim
        for t in range(begin // 4 * 4, end, 4):
            t0, t1 = max(t, begin), max(begin, min(t + 1, end - 1))
            t2, t3 = max(begin, min(t + 2, end - 1)), min(t + 3, end - 1)
            at_keys = key_at[t0], key_at[t1], key_at[t2], key_at[t3]
            at_values = value_at[t0], value_at[t1], value_at[t2], value_at[t3]
            s, j = at + t * LANES, t * LANES
            if r == 1:
                score_keys(q, q_at, keys, at_keys, dim, scale, scales, j, scores, (s,), values, at_values)
            elif r == 2:
                score_keys(q, q_at, keys, at_keys, dim, scale, scales, j, scores, (s, s + CHUNK), values, at_values)
            elif r == 3:
                to = (s, s + CHUNK, s + 2 * CHUNK)
                score_keys(q, q_at, keys, at_keys, dim, scale, scales, j, scores, to, values, at_values)
            elif r == 4:
                to = (s, s + CHUNK, s + 2 * CHUNK, s + 3 * CHUNK)
                score_keys(q, q_at, keys, at_keys, dim, scale, scales, j, scores, to, values, at_values)
            else:
                to = (
                    s, s + CHUNK, s + 2 * CHUNK, s + 3 * CHUNK, s + 4 * CHUNK, s + 5 * CHUNK, s + 6 * CHUNK,
                    s + 7 * CHUNK,
                )  # fmt: skip
                score_keys(q, q_at, keys, at_keys, dim, scale, scales, j, scores, to, values, at_values)
        v += r


@compiled
def _add(weights, v, r, values, value_at, begin, end, width, out, keys, key_at):
    """Adds the values of keys begin ≤ j < end to the sums of r queries from v on."""
    w, z, record = v * CHUNK, v * (width + RECORD), width + RECORD
    ahead = key_at[_TILES:]
    if r == 1:
        add_values(weights, (w,), values, value_at, begin, end, width, out, (z,), keys, ahead)
    elif r == 2:
        add_values(weights, (w, w + CHUNK), values, value_at, begin, end, width, out, (z, z + record), keys, ahead)
    elif r == 3:
        at, to = (w, w + CHUNK, w + 2 * CHUNK), (z, z + record, z + 2 * record)
        add_values(weights, at, values, value_at, begin, end, width, out, to, keys, ahead)
    else:
        four = (w, w + CHUNK, w + 2 * CHUNK, w + 3 * CHUNK)
        add_values(
            weights,
            four,
            values,
            value_at,
            begin,
            end,
            width,
            out,
            (z, z + record, z + 2 * record, z + 3 * record),
            keys,
            ahead,
        )
