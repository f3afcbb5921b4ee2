"""How often each token, and each pair of tokens that follow each other, has come.

    o(t) = rows whose token is t;   o(s, t) ≤ h[hash(s, t)] = rows whose pair has this hash

Pairs are counted by a hash of `buckets` values, so that of few pairs one shares its bucket, and its count is too large
then: by n / buckets on average. A share of occurrences that is computed with it is therefore never too large.

Together with top_keys.py it decides whether a unit fires on 95 % of the occurrences of a key. Kept: int64 [vocab] and
[buckets]: 8 · (vocab + buckets) bytes. Rows of one layer are enough to be told the tokens; their values are not looked
at, so any site and layer does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.reducers.reducer import Place, Resumable
from patchclamp_server.engine.reducers.top_keys import NO_KEY, keys_of
from patchclamp_server.model.arrays import IntArray

DEFAULT_BUCKETS = 1 << 20
# Fibonacci hashing: 2^64 divided by the golden ratio.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Occurrences(Resumable):
    """`buckets`: a power of two from 2 on."""

    def __init__(self, layer: int, vocab: int, buckets: int = DEFAULT_BUCKETS) -> None:
        super().__init__((layer,))
        assert buckets >= 2
        assert buckets & (buckets - 1) == 0
        self.vocab, self.buckets = vocab, buckets
        self._tokens = np.zeros(vocab, dtype=np.int64)
        self._pairs = np.zeros(buckets, dtype=np.int64)

    def parameters(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "buckets": self.buckets}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        np.add.at(self._tokens, place.tokens(len(rows)), 1)
        keys = keys_of(place, len(rows), self.vocab, pair=True)
        np.add.at(self._pairs, self._bucket(keys[keys != NO_KEY]), 1)

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """int64 alike: exact. Of NO_KEY 0."""
        return self._looked_up(self._tokens, tokens, tokens.numpy())

    def of_pairs(self, keys: Tensor) -> Tensor:
        """int64 alike, of keys s · vocab + t: at least as many as have come. Of NO_KEY 0."""
        return self._looked_up(self._pairs, keys, self._bucket(keys.numpy()))

    def by_token(self) -> IntArray:
        """int64 [vocab]: exact; not a copy."""
        return self._tokens

    def by_hash(self) -> IntArray:
        """int64 [buckets]: pairs by their hash; not a copy."""
        return self._pairs

    @property
    def total(self) -> int:
        """Rows that have come."""
        return int(self._tokens.sum())

    def state(self) -> dict[str, Tensor]:
        return {"tokens": torch.from_numpy(self._tokens.copy()), "pairs": torch.from_numpy(self._pairs.copy())}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            self._tokens, self._pairs = np.zeros_like(self._tokens), np.zeros_like(self._pairs)
            return
        expected = {"tokens": (torch.int64, (self.vocab,)), "pairs": (torch.int64, (self.buckets,))}
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} != expected:
            raise ValueError(f"{sorted(state)}: expected {expected}")
        self._tokens, self._pairs = state["tokens"].clone().numpy(), state["pairs"].clone().numpy()

    def _bucket(self, keys: IntArray) -> IntArray:
        shift = np.uint64(64 - (self.buckets.bit_length() - 1))
        found: IntArray = ((keys.astype(np.uint64) * _MULTIPLIER) >> shift).astype(np.int64)
        return found

    @staticmethod
    def _looked_up(table: IntArray, keys: Tensor, places: IntArray) -> Tensor:
        return torch.where(keys == NO_KEY, 0, torch.from_numpy(table[places]))
