"""How well scores rank the texts of a label before all others, with intervals over texts.

    AUROC = P(score of a target > score of another) + P(equal) / 2
    AP    = Σ_n (R_n - R_{n-1}) P_n      precision P and recall R of "score >= threshold" at each threshold n, falling

Equal scores are one threshold. An interval has the middle 95 % of RESAMPLES draws of targets and of others, each with
replacement.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.analysis.neurons.intervals import RESAMPLES, Interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# Numbers of the tables of samples that are made at a time.
CHUNK = 1 << 22


class Ranking(NamedTuple):
    auroc: Interval
    average_precision: Interval


def ranking(scores: Floats, is_target: Bools, seed: int) -> Ranking:
    """scores, is_target [texts], at least one target and one other."""
    generator = np.random.default_rng(seed)
    found = [_measures(scores, is_target, np.ones((1, len(scores))))]
    rows = max(1, CHUNK // len(scores))
    for start in range(0, RESAMPLES, rows):
        n = min(rows, RESAMPLES - start)
        weights = np.empty((n, len(scores)))
        for kind in (is_target, ~is_target):
            size = int(kind.sum())
            weights[:, kind] = generator.multinomial(size, np.full(size, 1 / size), size=n)
        found.append(_measures(scores, is_target, weights))
    measures = np.concatenate(found, axis=1)
    return Ranking(_interval(measures[0]), _interval(measures[1]))


def auroc(scores: Floats, is_target: Bools) -> float:
    return float(_measures(scores, is_target, np.ones((1, len(scores))))[0, 0])


def _measures(scores: Floats, is_target: Bools, weights: Floats) -> Floats:
    """Returns AUROC and AP of each sample, [2, samples], given how often texts are in it [samples, texts]."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    # Where a threshold ends: the last of equal scores.
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    own = weights[:, order]
    hits = np.cumsum(own * is_target[order], axis=1)[:, ends]
    seen = np.cumsum(own, axis=1)[:, ends]
    misses = seen - hits
    zero = np.zeros((len(weights), 1))
    gained = np.diff(hits, axis=1, prepend=zero)
    before = np.diff(misses, axis=1, prepend=zero)
    # A target beats all others below its threshold, and half of those at it.
    below = misses[:, -1:] - misses
    area = (gained * (below + before / 2)).sum(1) / (hits[:, -1] * misses[:, -1])
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    return np.stack([area, (gained * precision).sum(1) / hits[:, -1]])


def _interval(samples: Floats) -> Interval:
    low, high = np.quantile(samples[1:], [0.025, 0.975])
    return Interval(float(samples[0]), float(low), float(high))
