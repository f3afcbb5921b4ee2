"""The sums of sampling on a CPU: each row is summed by itself in one order; torch's depends on the number of rows.

The functions are compiled once and cached on disk; a change in cpu/invariant needs one here.
"""

# mypy has no types for what numba compiles, and the first argument of an intrinsic is not given by its caller.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, var-annotated"

import math

import numba
import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant.rows import SMALLEST, exponentials
from patchclamp_server.cpu.invariant.tiles import largest_of, sum_of
from patchclamp_server.cpu.vector import LANES

# So many masses are summed before they are added to the sum of all.
BLOCK = 256

_compiled = numba.njit(nogil=True, cache=True)


def log_totals(logits: Tensor) -> Tensor:
    """Returns log Σ exp(l) of each row [n, vocab] float32, as [n, 1]."""
    totals = torch.empty(len(logits), 1)
    _log_totals(logits.contiguous().numpy(), totals.numpy())
    return totals


def running_masses(head: Tensor, log_total: Tensor) -> Tensor:
    """Returns Σ_{j ≤ i} exp(l_j - log total) [n, size] float64, for rows of head [n, size] and log_total [n, 1]."""
    masses = torch.empty(head.shape, dtype=torch.float64)
    _running_masses(head.contiguous().numpy(), log_total.contiguous().numpy(), masses.numpy())
    return masses


def invert_cdf(scores: Tensor, u: Tensor) -> Tensor:
    """Returns the first id [n] at which the running sum of exp(scores) passes u [n] float64 times its total. scores:
    [n, vocab], at most 0, overwritten."""
    ids = torch.empty(len(scores), dtype=torch.int64)
    _invert_cdf(scores.numpy(), u.numpy(), ids.numpy())
    return ids


@_compiled
def _exponentials_in_blocks(x, powers, sums):
    """Writes exp(x) into x, 0 where that is less than float32 holds, and the sum of each block into `sums`."""
    for b in range(sums.shape[0]):
        block = x[b * BLOCK : (b + 1) * BLOCK]
        for k in range(block.shape[0]):
            # The exponential of such a number does not come out as 0.
            powers[k] = block[k] < SMALLEST
        exponentials(block, powers[BLOCK : BLOCK + block.shape[0]])
        for k in range(block.shape[0]):
            block[k] = np.float32(0) if powers[k] else block[k]
        whole = block.shape[0] // LANES * LANES
        sums[b] = sum_of(block, 0, whole)
        for k in range(whole, block.shape[0]):
            sums[b] += block[k]


@_compiled
def _log_totals(logits, totals):
    vocab = logits.shape[1]
    powers = np.empty(2 * BLOCK, dtype=np.int32)
    sums = np.empty((vocab + BLOCK - 1) // BLOCK, dtype=np.float64)
    masses = np.empty(vocab, dtype=np.float32)
    for i in range(logits.shape[0]):
        row = logits[i]
        largest = largest_of(row, 0, vocab // LANES * LANES)
        for k in range(vocab // LANES * LANES, vocab):
            largest = max(largest, row[k])
        for k in range(vocab):
            masses[k] = row[k] - largest
        _exponentials_in_blocks(masses, powers, sums)
        total = 0.0
        for b in range(sums.shape[0]):
            total += sums[b]
        totals[i, 0] = np.float64(largest) + math.log(total)


@_compiled
def _running_masses(head, log_total, masses):
    for i in range(head.shape[0]):
        total = 0.0
        for j in range(head.shape[1]):
            total += math.exp(np.float64(head[i, j]) - np.float64(log_total[i, 0]))
            masses[i, j] = total


@_compiled
def _invert_cdf(scores, u, ids):
    vocab = scores.shape[1]
    powers = np.empty(2 * BLOCK, dtype=np.int32)
    sums = np.empty((vocab + BLOCK - 1) // BLOCK, dtype=np.float64)
    for i in range(scores.shape[0]):
        masses = scores[i]
        _exponentials_in_blocks(masses, powers, sums)
        total = 0.0
        for b in range(sums.shape[0]):
            total += sums[b]
        target = u[i] * total
        # The last id with mass is drawn where rounding leaves the sum at the target or below it.
        reached = 0.0
        block = 0
        last = 0
        for b in range(sums.shape[0]):
            if sums[b] > 0:
                last = b
        while block < last and reached + sums[block] <= target:
            reached += sums[block]
            block += 1
        drawn = -1
        for k in range(block * BLOCK, min(vocab, (block + 1) * BLOCK)):
            if masses[k] > 0:
                drawn = k
                reached += masses[k]
                if reached > target:
                    break
        ids[i] = drawn
