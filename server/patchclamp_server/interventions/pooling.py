"""What stands for a text of many tokens: a mean or maximum of their states or the last one, without attention sinks.

    outlier   token t ≥ 1 with ‖h_t‖ > 3 · median_{s ≥ 1} ‖h_s‖      of one text, at one site and layer
    mean      (1/n) Σ h_t     over the n tokens t ≥ 1 that are no outliers
    last      h_t of the last token t that is none
    max       max_t h_t       over all tokens t ≥ 1, each unit for itself

Why: attention rests on a few tokens whose norm is many times that of the others (Sun et al. 2024, Massive Activations
in Large Language Models). The first token (t = 0, left out always) is the one most known, not the only one: in
Qwen2.5 it is also the first "." or "," of a text (17 times the median norm), in SmolLM2-135M now and then a word (50
times). Such a state says where attention rests and hardly anything of the text; a mean that holds one tells little
else. A maximum keeps them: one token does not hide the others, and a neuron that detects a token makes its norm large.
Of all other tokens of SmolLM2 not one in a hundred reaches 2.5 times the median at any layer. The median
is the lower one of two, so that of two tokens the larger can be the outlier, and at most half of the tokens are.

Tokens are left out rather than normalised, so that a mean stays a mean of activations that occur, and strength 1 of a
difference of means moves one mean onto the other. Both were measured to find directions equally well.

With a scope, what is pooled are the tokens in scope. Which of them are outliers is still judged by the norms of the
whole text: a scope of two tokens has no median that tells anything. Asked for explicitly, a token is never passed over
for nothing: the first token stands where it is the only one in scope, and where all tokens in scope are outliers, they
stand as if none were.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.model.arrays import BoolArray

OUTLIER_RATIO = 3.0
# These bound the rows of a text that are kept until its norms are known, and with them memory. A mean leaves out at
# most MOST_LEFT_OUT tokens, the largest; where the last LAST_TOKENS are all outliers, the very last stands for the
# text.
MOST_LEFT_OUT = 64
LAST_TOKENS = 8


class Pooling(Enum):
    LAST_TOKEN = "last_token"
    MEAN = "mean"
    MAX = "max"


ROOM = {Pooling.MEAN: MOST_LEFT_OUT, Pooling.LAST_TOKEN: LAST_TOKENS, Pooling.MAX: 0}


@dataclass(frozen=True, eq=False)
class Pooled:
    """The pooled states of one text: values [n_layers, width] float32. By layer [n_layers], `tokens` is the number that
    they are the mean of, and `left_out` the number of outliers among all tokens, or among those after the last that is
    none."""

    values: Tensor
    tokens: Tensor
    left_out: Tensor

    def cpu(self) -> "Pooled":
        return Pooled(self.values.cpu(), self.tokens.cpu(), self.left_out.cpu())


def outliers(norms: Tensor) -> Tensor:
    """Returns which tokens are outliers, as bool [..., n], given the norms [..., n] of a text without its first token.
    A norm that is not finite is none: it is a fault to be seen, and not a token to be passed over."""
    median = norms.median(dim=-1, keepdim=True).values
    return (norms > OUTLIER_RATIO * median) & (median > 0) & norms.isfinite()


def ordinary_tokens(states: Tensor) -> Tensor:
    """Returns the ordinary tokens, bool [..., T], of whole texts with states [..., T, width]: no outliers, and not the
    first token unless it is the only one."""
    norms = states.float().norm(dim=-1)
    if norms.shape[-1] == 1:
        return torch.ones_like(norms, dtype=torch.bool)
    return torch.cat((torch.zeros_like(norms[..., :1], dtype=torch.bool), ~outliers(norms[..., 1:])), dim=-1)


def pooled_tokens(norms: Tensor, pooling: Pooling) -> Tensor:
    """Returns the tokens that a TokenPool without a scope takes of a whole text, bool [T], given its norms [T]: those
    that are averaged, or the one that stands for it. Not of a maximum."""
    n = len(norms)
    found = torch.zeros(n, dtype=torch.bool, device=norms.device)
    if n == 1:
        return ~found
    passed = outliers(norms[1:])
    if pooling is Pooling.MEAN:
        found[1:] = True
        places = passed.nonzero()[:, 0] + 1
        if len(places) > MOST_LEFT_OUT:
            places = places[torch.topk(norms[places], MOST_LEFT_OUT).indices]
        found[places] = False
        return found
    assert pooling is Pooling.LAST_TOKEN
    last = (~passed[-LAST_TOKENS:]).nonzero()[:, 0]
    found[n - min(LAST_TOKENS, n - 1) + int(last[-1]) if len(last) else n - 1] = True
    return found


class RowSink(Protocol):
    """Takes the rows of one text as steps compute them."""

    layers: tuple[int, ...]

    def add(self, layer: int, states: Tensor, start: int, /) -> None:
        """Takes states [n, width] of tokens start ≤ t < start + n; they come again after a preemption."""
        ...


class TokenPool:
    """Pools one text of T tokens whose states come in chunks, layer by layer.

    Which norms are outliers is known at the end. Rows that may turn out to be, the largest, or to be the last that is
    none, are kept until then; the others are summed in float32 and let go. `of`: what is pooled, such as the squares of
    states or their projections; outliers are those of the states themselves. `chosen` [T]: tokens in scope, at least
    one; None: all.
    """

    def __init__(
        self,
        pooling: Pooling,
        layers: tuple[int, ...],
        n_tokens: int,
        of: Callable[[Tensor], Tensor] = lambda states: states,
        chosen: BoolArray | None = None,
    ) -> None:
        self.pooling, self.layers, self.n_tokens = pooling, layers, n_tokens
        self._of = of
        # The first token is not pooled, unless there is no other.
        self._pooled, self._chosen = max(n_tokens - 1, 1), chosen
        if chosen is not None:
            self._chosen = chosen & (np.arange(n_tokens) > 0) if chosen[1:].any() else chosen
            self._pooled = int(self._chosen.sum())
        self._of_all = pooling is not Pooling.LAST_TOKEN
        # At most half of the tokens of a text are outliers.
        most = min(self._pooled, max(n_tokens - 1, 1) // 2) if self._of_all else self._pooled
        self._room = min(most, ROOM[pooling])
        self._layers: dict[int, _Layer] = {}

    def add(self, layer: int, states: Tensor, start: int) -> None:
        """Takes states [n, width] of tokens start ≤ t < start + n ≤ T. Token 0 begins the text anew after a
        preemption."""
        # This copies, because the blocks go on to edit the residual stream in place.
        states = states.to(torch.float32, copy=True)
        places = torch.arange(start, start + len(states), device=states.device)
        norms = states.norm(dim=1)
        first = 1 if start == 0 and self.n_tokens > 1 else 0
        norms = norms[first:]
        if self._chosen is None:
            states, places = states[first:], places[first:]
        else:
            own = torch.from_numpy(np.flatnonzero(self._chosen[start : start + len(states)])).to(states.device)
            states, places = states[own], places[own]
        if start == 0:
            nothing = -torch.inf if self.pooling is Pooling.MAX else 0.0
            width = self._of(states[:0]).shape[1]
            self._layers[layer] = _Layer(norms, states, places, states.new_full((width,), nothing))
        else:
            so_far = self._layers[layer]
            so_far.norms = torch.cat((so_far.norms, norms))
            so_far.states = torch.cat((so_far.states, states))
            so_far.places = torch.cat((so_far.places, places))
        self._let_go(self._layers[layer])

    def _let_go(self, layer: "_Layer") -> None:
        """Lets go of all rows but those that there is room for, and adds them to the sum of a mean."""
        if len(layer.states) <= self._room:
            return
        kept = torch.topk(layer.states.norm(dim=1) if self._of_all else layer.places, self._room).indices
        if self.pooling is Pooling.MEAN:
            layer.pooled += self._of(layer.states).index_fill(0, kept, 0.0).sum(dim=0)
        elif self.pooling is Pooling.MAX:
            layer.pooled = torch.maximum(layer.pooled, self._of(layer.states).amax(dim=0))
        layer.states, layer.places = layer.states[kept], layer.places[kept]

    def result(self) -> Pooled:
        """Returns the pooled states; all tokens of all layers must have come."""
        found = [self._result(self._layers[layer]) for layer in self.layers]
        return Pooled(*(torch.stack(column) for column in zip(*found, strict=True)))

    def _result(self, layer: "_Layer") -> tuple[Tensor, Tensor, Tensor]:
        if self.pooling is Pooling.MAX:
            return layer.pooled, torch.tensor(self._pooled), torch.tensor(0)
        # These are indices into the norms, which begin with token 1 unless there is only token 0.
        index = layer.places - (1 if self.n_tokens > 1 else 0)
        # Of the first token, which stands where it is the only one in scope, norms say nothing.
        passed = outliers(layer.norms)[index.clamp(min=0)] & (index >= 0)
        if len(index) == self._pooled:
            passed = passed & ~passed.all()
        left_out = passed.sum()
        tokens = self._pooled - left_out
        if self.pooling is Pooling.MEAN:
            total = layer.pooled + self._of(layer.states).masked_fill(passed[:, None], 0.0).sum(dim=0)
            return total / tokens, tokens, left_out
        last = torch.where(passed, -1, layer.places).argmax()
        last = torch.where(passed.all(), layer.places.argmax(), last)
        return self._of(layer.states[last][None])[0], torch.ones_like(last), (layer.places > layer.places[last]).sum()


@dataclass(eq=False)
class _Layer:
    norms: Tensor  # of all tokens that came
    states: Tensor  # [k, width] of those that are kept, at `places` [k]
    places: Tensor
    pooled: Tensor  # [width], sum or maximum of the others
