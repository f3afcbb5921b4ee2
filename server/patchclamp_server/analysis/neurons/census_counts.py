"""What a census counts in one pass over the texts, all of it in memory that does not grow with them.

    N, n_b            tokens, and those at positions of bin b
    c_i, c_bi         tokens at which neuron i fires, and those of bin b
    f_i(t), o(t)      firings at token t, of at most KEYS tokens of each neuron, and how often t comes; alike of pairs

Kept by layer: 8 · bins · d_ff bytes, and of tokens as of pairs (24 · KEYS + 16) · d_ff.
"""

from dataclasses import dataclass

from torch import Tensor

from patchclamp_server.engine.reducers.firing_by_position import FiringByPosition
from patchclamp_server.engine.reducers.occurrences import Occurrences
from patchclamp_server.engine.reducers.top_keys import TopKeys, Triggers
from patchclamp_server.engine.request import Reduction
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

KEYS = 8
# A neuron without a key that makes up half of its firings, looked at every so many firings, is no detector.
_LEAST_SHARE, _LEAST_FIRINGS = 0.5, 64


@dataclass(frozen=True, eq=False)
class KeyCounts:
    """The tokens, or the pairs of tokens, at which the neurons of a layer fire most, and `occurrences` of each, int64
    [d_ff, KEYS]: exact of tokens, at least as many as there are of pairs."""

    triggers: Triggers
    occurrences: Tensor


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """All int64. `rows` [bins] and `by_bin` [bins, d_ff]: tokens and firings by position. `pairs`: None where they are
    not counted."""

    layer: int
    rows: Tensor
    by_bin: Tensor
    tokens: KeyCounts
    pairs: KeyCounts | None

    @property
    def total(self) -> int:
        return int(self.rows.sum())

    @property
    def fired(self) -> Tensor:
        """int64 [d_ff]"""
        return self.by_bin.sum(0)


class Counters:
    """The reducers of one census. A neuron fires above the threshold, or with `magnitude` where its size is."""

    def __init__(
        self,
        layers: tuple[int, ...],
        info: ModelInfo,
        *,
        threshold: float,
        magnitude: bool,
        ngram: int,
        bins: int,
        window_tokens: int,
    ) -> None:
        self.layers = layers
        self.occurrences = Occurrences(layers[0], info.vocab_size)
        self._positions = FiringByPosition(layers, bins, window_tokens, threshold, magnitude=magnitude)
        self._keys = [
            TopKeys(
                layers,
                info.vocab_size,
                KEYS,
                threshold,
                magnitude=magnitude,
                pair=pair,
                most_rate=1.0,
                least_share=_LEAST_SHARE,
                least_firings=_LEAST_FIRINGS,
            )
            for pair in (False, True)[:ngram]
        ]

    def reductions(self, site: Site) -> tuple[Reduction, ...]:
        return tuple(Reduction(site, reducer) for reducer in (self._positions, *self._keys, self.occurrences))

    def of_layer(self, layer: int) -> LayerCounts:
        """Raises KeyError where no token has come."""
        rows, by_bin = self._positions.rows(layer), self._positions.counts(layer).cpu()
        found = [keys.triggers(layer) for keys in self._keys]
        tokens = KeyCounts(found[0], self.occurrences.of_tokens(found[0].keys))
        pairs = [KeyCounts(each, self.occurrences.of_pairs(each.keys)) for each in found[1:]]
        return LayerCounts(layer, rows, by_bin, tokens, pairs[0] if pairs else None)
