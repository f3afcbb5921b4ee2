"""What a census would find of neurons that fire at random, each with its own rate, at whichever token.

    positional    c'_bi ~ Binomial(n_b, rate_i): the bits of a table that has nothing to tell, with the bias taken off
    detectors     Σ_i Σ_t P(f ≥ recall · o(t), f ≥ (1 - elsewhere) · c_i),   f ~ Binomial(o(t), rate_i)
                  ≤ Σ_i Σ_t exp(-o(t) · D(max(recall, (1 - elsewhere) c_i / o(t)) ‖ rate_i))      (Chernoff)

with D the divergence of two coins in nats; a bound and not an estimate. Keys that come fewer than min_occurrences
times are left out, as in the census.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.analysis.neurons.census_classes import Rules, position_bits
from patchclamp_server.model.arrays import IntArray

_SEED = 0
_AT_ONCE = 1 << 20


def random_positions(rows: Tensor, rates: Tensor, layer: int, rules: Rules) -> tuple[int, float, float]:
    """Returns the neurons of a layer that would be positional, the sum of their bits and the most."""
    generator = np.random.default_rng((_SEED, layer))
    drawn = generator.binomial(rows.numpy()[:, None], rates.numpy()[None])
    bits = position_bits(rows, torch.from_numpy(drawn.astype(np.int64)))
    return int((bits >= rules.positional_from).sum()), float(bits.sum()), float(bits.max())


def random_detectors(fired: IntArray, total: int, occurrences: IntArray, rules: Rules) -> float:
    """Returns the bound of detectors, of the firings [n] of all neurons in `total` tokens and the occurrences [m] of
    all keys."""
    counts, keys = np.unique(occurrences[occurrences >= max(1, rules.min_occurrences)], return_counts=True)
    firings, neurons = np.unique(fired[fired > 0], return_counts=True)
    if not len(counts):
        return 0.0
    # A key that comes less often cannot have so many of the firings.
    possible = firings * (1 - rules.elsewhere) <= counts[-1]
    firings, neurons = firings[possible], neurons[possible]
    found, step = 0.0, max(1, _AT_ONCE // len(counts))
    for at in range(0, len(firings), step):
        c = firings[at : at + step, None].astype(np.float64)
        share = np.maximum(rules.recall, (1 - rules.elsewhere) * c / counts)
        bound = np.where(share <= 1, np.exp(-counts * _divergence(np.minimum(share, 1), c / total)), 0.0)
        found += float(neurons[at : at + step] @ (bound @ keys))
    return found


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """D(p ‖ q) of coins where p > q, else 0; q above 0."""
    q = np.minimum(q, 1 - math.ulp(1.0))
    heads = p * np.log(np.maximum(p, math.ulp(0.0)) / q)
    tails = (1 - p) * np.log(np.maximum(1 - p, math.ulp(0.0)) / (1 - q))
    found: NDArray[np.float64] = np.where(p > q, heads + tails, 0.0)
    return found
