"""Drift is how far what a watch sees is from its reference; by chance alone it would not be 0.

    distance   d = ½ Σ_j |p_j - q_j|, the total variation distance of two distributions over the bins, 0 to 1
    noise      E d of two samples of one distribution, of n and m tokens: each p_j - q_j is about normal with
               s_j² = D r_j (1 - r_j) (1/n + 1/m) with r the share of both together, so that E d = Σ_j s_j / sqrt(2 π)
    spread     the deviation of d around it, sqrt((1/4 - 1/2π) Σ_j s_j²), the bins taken as independent

D is the inflation of the reference (reference.py): the tokens of a text are alike, and vary less than as many tokens
from anywhere. At 200 tokens against as many, 16 equal bins and D = 1, noise is .15, so a distance alone says little.
The largest distance of W items is, by chance, about noise + sqrt(2 ln W) spread.
"""

import math
from dataclasses import dataclass

import numpy as np

from patchclamp_server.monitoring.arrays import Floats, Ints


@dataclass(frozen=True, eq=False)
class Drift:
    distance: Floats  # [W]
    noise: Floats
    spread: Floats

    @property
    def excess(self) -> Floats:
        """The distance [W] beyond what is expected by chance."""
        beyond: Floats = np.maximum(self.distance - self.noise, 0.0)
        return beyond

    @property
    def mean(self) -> float:
        return float(self.distance.mean())

    @property
    def mean_noise(self) -> float:
        return float(self.noise.mean())

    @property
    def mean_excess(self) -> float:
        """Items below their noise offset those above it, so the mean of many is near 0 where nothing has changed."""
        return max(0.0, float((self.distance - self.noise).mean()))

    @property
    def max(self) -> float:
        return float(self.distance.max())

    @property
    def max_noise(self) -> float:
        """The largest distance to be expected by chance, at the item with the most noise."""
        return min(1.0, float(self._largest_by_chance().max()))

    @property
    def max_excess(self) -> float:
        return max(0.0, float((self.distance - self._largest_by_chance()).max()))

    def _largest_by_chance(self) -> Floats:
        largest: Floats = self.noise + math.sqrt(2.0 * math.log(len(self.noise))) * self.spread
        return largest


def drift_of(counts: Ints, reference: Ints, inflation: Floats) -> Drift:
    """Returns the drift of counts [W, bins]. An empty one has nothing in common with any: distance 1, noise 0."""
    n, m = counts.sum(axis=1), reference.sum(axis=1)
    empty = (n == 0) | (m == 0)
    n, m = np.maximum(n, 1), np.maximum(m, 1)
    distance = 0.5 * np.abs(counts / n[:, None] - reference / m[:, None]).sum(axis=1)
    both = (counts + reference) / (n + m)[:, None]
    variance = (inflation * (1.0 / n + 1.0 / m))[:, None] * both * (1.0 - both)
    noise = np.sqrt(variance).sum(axis=1) / math.sqrt(2.0 * math.pi)
    spread = np.sqrt((0.25 - 0.5 / math.pi) * variance.sum(axis=1))
    return Drift(
        np.where(empty, 1.0, distance), np.where(empty, 0.0, np.minimum(noise, 1.0)), np.where(empty, 0.0, spread)
    )
