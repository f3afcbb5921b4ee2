"""Confidence in an answer: how far the layers before the last agree on it, as it is generated.

    agreement of layer l       share of the tokens t at which argmax unembed(norm(h_l)) is t
    internal consistency       mean of it over the layers before the last

h_l is the residual stream at the end of block l, after all edits. With options, the answer is one token: a layer says
the option that it gives the largest share of the probability of all options, or of two options the first where its
share is above a threshold of the layer, and agrees where the last layer says the same.

Source: Xie et al. 2024, Calibrating Reasoning in Language Models with Internal Consistency: latent predictions of an
answer of two options, balanced by the median of each layer as threshold, and their agreement with the last. Agreement
over all tokens of an answer is ours. It needs one more readout in the program of the request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from patchclamp_server.engine.request import LatentPredictions
from patchclamp_server.interventions.bound import BoundProgram, BoundReadout
from patchclamp_server.interventions.program import GENERATING, LatentReadout, Scope, TokenSelector
from patchclamp_server.model.sites import Site

# This row generates the first token.
FIRST = Scope((TokenSelector(last_k=1),))
EVEN = 0.5


@dataclass(frozen=True)
class Option:
    text: str
    token: int


@dataclass(frozen=True)
class OptionConfidence:
    """The fields are as in the message of this name."""

    option: str
    token: int
    probability: tuple[float, ...]


@dataclass(frozen=True)
class ConfidenceReport:
    """The fields are as in the message of this name."""

    consistency: float
    layers: tuple[int, ...]
    layer_agreement: tuple[float, ...]
    layer_probability: tuple[float, ...]
    options: tuple[OptionConfidence, ...]
    tokens: int


@dataclass(frozen=True)
class Confidence:
    """What is asked: ascending layers of a model that has `n_layers`, and with options a threshold for each layer."""

    layers: tuple[int, ...]
    n_layers: int
    options: tuple[Option, ...] = ()
    thresholds: tuple[float, ...] = ()

    @property
    def readout(self) -> BoundReadout:
        # With options the last layer has the say that the others are compared with.
        read = tuple(sorted({*self.layers, self.n_layers - 1})) if self.options else self.layers
        ids = tuple(option.token for option in self.options)
        scope = FIRST if self.options else GENERATING
        # Values of this readout are no ReadoutValues, and need no name.
        return BoundReadout("", LatentReadout, Site.RESID_POST, read, scope, {}, ids, 0)

    def added_to(self, program: BoundProgram) -> BoundProgram:
        """Returns the program as its receipt knows it, with what confidence reads."""
        return replace(program, readouts=(*program.readouts, self.readout))


@dataclass(eq=False)
class AnswerConfidence:
    """Follows the predictions of one request, in any order."""

    asked: Confidence
    tokens: int = 0
    agreed: list[float] = field(init=False)
    probability: list[float] = field(init=False)
    # [layers][options], those of the one token that is read.
    shares: list[tuple[float, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.agreed, self.probability = ([0.0] * len(self.asked.layers) for _ in range(2))

    def add(self, predictions: LatentPredictions) -> None:
        asked = self.asked
        by_layer = {each.layer: each for each in predictions.layers}
        own = [by_layer[layer] for layer in asked.layers]
        self.tokens += 1
        for i, said in enumerate(own):
            self.probability[i] += math.exp(said.logprobs[0])
        if not asked.options:
            for i, said in enumerate(own):
                self.agreed[i] += said.top == predictions.token
            return
        self.shares = [_shares(said.logprobs[1:]) for said in own]
        last = _said(_shares(by_layer[asked.n_layers - 1].logprobs[1:]), self._threshold(asked.n_layers - 1))
        for i, (layer, shares) in enumerate(zip(asked.layers, self.shares, strict=True)):
            self.agreed[i] += _said(shares, self._threshold(layer)) == last

    def _threshold(self, layer: int) -> float:
        return dict(zip(self.asked.layers, self.asked.thresholds, strict=False)).get(layer, EVEN)

    def report(self) -> ConfidenceReport:
        """Returns the report on what was read so far: of no token, there are zeros, and no probability of options."""
        asked, n = self.asked, max(self.tokens, 1)
        agreement = tuple(agreed / n for agreed in self.agreed)
        before = [a for a, layer in zip(agreement, asked.layers, strict=True) if layer < asked.n_layers - 1]
        return ConfidenceReport(
            consistency=sum(before) / len(before),
            layers=asked.layers,
            layer_agreement=agreement,
            layer_probability=tuple(p / n for p in self.probability),
            options=tuple(
                OptionConfidence(option.text, option.token, tuple(shares[i] for shares in self.shares))
                for i, option in enumerate(asked.options)
            ),
            tokens=self.tokens,
        )


def _shares(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Returns probabilities in proportion to those given, which may be small, that sum to 1."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    return tuple(weight / sum(weights) for weight in weights)


def _said(shares: Sequence[float], threshold: float) -> int:
    """Returns the option that a layer says."""
    if len(shares) == 2:
        return 0 if shares[0] > threshold else 1
    return max(range(len(shares)), key=shares.__getitem__)
