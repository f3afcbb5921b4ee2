"""A watch leaves outliers out of its figures: attention sinks beyond the first token.

    left out   row x_t with ‖x_t‖ > 3 · median_s ‖x_s‖     x: all of the site and layer that an item is at

This is the rule of pooling.py, where the median is over a text; the median of a watch is over the first tokens that it
sees, or over the tokens of its reference. For a neuron, x is all neurons of its layer at its site, as for static sets.
Where most rows are 0 nothing is an outlier. A norm that is not finite is not an outlier either, but a fault to be seen.

The value of a head is a probability, which no norm inflates, so nothing is left out of it. (The norm of attn_z would
even leave out the wrong tokens: it is large where heads look away from a sink, whose values are small.)
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.interventions.pooling import OUTLIER_RATIO
from patchclamp_server.monitoring.arrays import Float32s, Floats, Ints, floor32


@dataclass(frozen=True, eq=False)
class Outliers:
    """The outliers of W items. `norms` has the median at the place of each item, 0 where nothing is left out;
    `place_of` tells which place of the watch that is, -1 for none."""

    norms: Floats  # [W]
    place_of: Ints  # [W]

    @classmethod
    def none(cls, n_items: int) -> "Outliers":
        return cls(np.zeros(n_items), np.full(n_items, -1, dtype=np.int64))

    @classmethod
    def of(cls, norms: Float32s, place_of: Ints) -> "Outliers":
        """Takes medians of norms [n, places]."""
        return cls(np.append(_medians(norms), 0.0)[place_of], place_of)

    @cached_property
    def limits(self) -> Float32s:
        """The limits [W]: a finite norm above one is an outlier; it is infinite where nothing is left out."""
        return floor32(np.where(self.norms > 0.0, OUTLIER_RATIO * self.norms, np.inf))

    def without(self, values: Float32s, norms: Float32s) -> Float32s:
        """Returns values [n, W] with NaN where a token is left out; norms are [n, places]."""
        judged = np.flatnonzero(self.norms > 0.0)
        own = norms[:, self.place_of[judged]]
        rows, items = np.nonzero((own > self.limits[judged]) & np.isfinite(own))
        if not len(rows):
            return values
        without = values.copy()
        without[rows, judged[items]] = np.nan
        return without


def _medians(norms: Float32s) -> NDArray[np.float64]:
    """Returns the median [places] of the finite norms of each place: the lower one of two, 0 without any."""
    found = np.zeros(norms.shape[1])
    for place, own in enumerate(norms.T):
        own = own[np.isfinite(own)]
        if len(own):
            middle = (len(own) - 1) // 2
            found[place] = np.partition(own, middle)[middle]
    return found
