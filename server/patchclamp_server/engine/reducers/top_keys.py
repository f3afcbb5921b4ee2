"""The tokens, or pairs of tokens, with which every unit fires most, in bounded memory.

    f_i(t) = Σ [x_i > θ] over the rows whose token is t;  of a pair (s, t): whose token is t behind s

or with `magnitude` Σ [|x_i| > θ].

Space-Saving (Metwally, Agrawal and El Abbadi 2005): k slots a unit. A key that has one is counted; one that has none
takes the slot of the least count c, which goes on as c + 1 with the error c. With n_i = Σ_t f_i(t):

    count - error ≤ f_i(t) ≤ count,   error ≤ n_i / k,   and every t with f_i(t) > n_i / k has a slot

So a key that makes up a large share of the firings is in it, and where no slot was taken over (error 0) counts are
exact. Which keys share the lesser slots depends on the order of rows; the bounds do not.

A unit can be let go for good, and its `n_i` stands still: what it fires at is of no interest then.

    most_rate      once `least_rows` rows have come, it has fired in more than this share of them: a token that is a
                   share p of the text can make up 95 % of the firings only of a unit that fires in at most p / 0.95
    least_share    at every `least_firings` firings, its largest count is less than this share of them

With a `least_share` what a unit costs in all is bounded: its first `least_firings` firings, unless they are of one key.
What is judged is the share so far, so documents should come in mixed order: of a corpus that begins with one language,
units of another are let go.

Kept by layer, on the host: three times int64 [width, k] and twice int64 [width]: 24 · layers · width · k bytes and 16 ·
layers · width. Of rows on a device, which units fire travels to the host: a byte a value.

Source: Voita et al. 2023, Neurons in Large Language Models: Dead, N-gram, Positional, for what it is asked for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.reducers import loops
from patchclamp_server.engine.reducers.reducer import ByLayer, Place
from patchclamp_server.model.arrays import IntArray

# Of a slot that nothing has taken, and of a row that has no pair.
NO_KEY = -1


@dataclass(frozen=True, eq=False)
class Triggers:
    """All int64: keys, counts and errors [width, k], the largest count first, NO_KEY with 0 where fewer keys came;
    firings [width], n_i; `let_go` bool [width]: units that were let go, whose keys mean nothing."""

    keys: Tensor
    counts: Tensor
    errors: Tensor
    firings: Tensor
    let_go: Tensor


class TopKeys(ByLayer):
    """`pair`: of a row's token and the one before it, key s · vocab + t, which the first token of a text has not;
    else of the token alone, key t. `vocab`: ids are below it."""

    def __init__(
        self,
        layers: tuple[int, ...],
        vocab: int,
        k: int = 8,
        threshold: float = 0.0,
        *,
        magnitude: bool = False,
        pair: bool = False,
        most_rate: float = 0.1,
        least_rows: int = 4096,
        least_share: float = 0.0,
        least_firings: int = 64,
    ) -> None:
        super().__init__(layers)
        self.vocab, self.k, self.threshold, self.pair = vocab, k, threshold, pair
        self.magnitude = magnitude
        self.most_rate, self.least_rows = most_rate, least_rows
        self.least_share, self.least_firings = least_share, least_firings

    def parameters(self) -> dict[str, Any]:
        return {
            "vocab": self.vocab,
            "k": self.k,
            "threshold": self.threshold,
            "magnitude": self.magnitude,
            "pair": self.pair,
            "most_rate": self.most_rate,
            "least_rows": self.least_rows,
            "least_share": self.least_share,
            "least_firings": self.least_firings,
        }

    def _begin(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "rows": torch.zeros(1, dtype=torch.int64),
            "firings": torch.zeros(width, dtype=torch.int64),
            "let_go": torch.zeros(width, dtype=torch.int64),
            "keys": torch.full((width, self.k), NO_KEY, dtype=torch.int64),
            "counts": torch.zeros((width, self.k), dtype=torch.int64),
            "errors": torch.zeros((width, self.k), dtype=torch.int64),
        }

    def _add(self, kept: dict[str, Tensor], rows: Tensor, place: Place) -> None:
        keys = keys_of(place, len(rows), self.vocab, pair=self.pair)
        if not rows.is_cpu:
            # A byte a value, and not four.
            x, threshold, magnitude = self._fired(rows), 0.0, False
        else:
            x, threshold, magnitude = rows, self.threshold, self.magnitude
        own = {name: tensor.numpy() for name, tensor in kept.items()}
        loops.count_keys(
            loops.array_of(x),
            np.float32(threshold),
            magnitude,
            keys,
            own["rows"],
            own["firings"],
            own["let_go"],
            self.least_rows,
            self.most_rate,
            self.least_firings,
            self.least_share,
            own["keys"],
            own["counts"],
            own["errors"],
        )

    def _fired(self, rows: Tensor) -> Tensor:
        x = rows.float()
        return ((x.abs() if self.magnitude else x) > self.threshold).cpu()

    def rows(self, layer: int) -> int:
        """Rows that have a key."""
        return int(self._kept[layer]["rows"]) if layer in self._kept else 0

    def triggers(self, layer: int) -> Triggers:
        """Raises KeyError where no row has come."""
        kept = self._kept[layer]
        order = kept["counts"].argsort(dim=1, descending=True, stable=True)
        keys, counts, errors = (kept[name].gather(1, order) for name in ("keys", "counts", "errors"))
        return Triggers(keys, counts, errors, kept["firings"], kept["let_go"].bool())


def keys_of(place: Place, n: int, vocab: int, *, pair: bool) -> IntArray:
    """int64 [n] of the rows from `place` on: NO_KEY where a row has none."""
    if not pair:
        return place.tokens(n)
    ids = place.tokens(n, before=1)
    keys: IntArray = ids[:-1] * vocab + ids[1:]
    return keys if len(keys) == n else np.concatenate(([NO_KEY], keys))
