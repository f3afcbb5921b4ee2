"""The classes of a census: what the counts of a layer say of each of its neurons.

    rate          c_i / N
    dead          c_i = 0                    rare    0 < rate < rare_below            always    rate ≥ always_from
    token         f_i(t) / o(t) ≥ recall, 1 - f_i(t) / c_i ≤ elsewhere, o(t) ≥ min_occurrences        for one token t
    n-gram        the same for a pair (s, t), of a neuron that is no detector of a token
    positional    I(fires; bin) ≥ positional_from

Firings at a key are a lower bound and occurrences of a pair an upper one (top_keys.py, occurrences.py), so whatever is
named a detector is one. A neuron of whose firings so far no key has half is let go (census_counts.py), and never named
one: texts should come in mixed order.

The mutual information is that of the table of counts, less its bias (Miller and Madow 1955), and not below 0:

    I = Σ_b p_b Σ_{x ∈ {0, 1}} p(x | b) log2 (p(x | b) / p(x)) - (m_xb - m_x - m_b + 1) / (2 N ln 2)       bits

with m the numbers of cells, values and bins that are not empty.

Source: Voita, Ferrando and Nalmpantis 2023, Neurons in Large Language Models: Dead, N-gram, Positional. There neurons
are after a ReLU, and detectors are found by the tokens that a neuron is on for.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.census_counts import KeyCounts, LayerCounts
from patchclamp_server.engine.reducers.top_keys import NO_KEY


class NeuronClass(Enum):
    """The value ends the tag of the set."""

    DEAD = "dead"
    RARE = "rare"
    ALWAYS = "always"
    TOKEN = "token"
    NGRAM = "ngram"
    POSITIONAL = "positional"


@dataclass(frozen=True)
class Rules:
    """See above."""

    rare_below: float = 1e-4
    always_from: float = 0.99
    recall: float = 0.95
    elsewhere: float = 0.05
    min_occurrences: int = 10
    positional_from: float = 0.05


@dataclass(frozen=True, eq=False)
class BestKeys:
    """Of each neuron its best key: all [d_ff]; int64 `keys`, `fired` and `occurrences`, float64 `recall` and
    `elsewhere`, bool `detects`. Where it has none, NO_KEY and 0."""

    keys: Tensor
    fired: Tensor
    occurrences: Tensor
    recall: Tensor
    elsewhere: Tensor
    detects: Tensor


@dataclass(frozen=True, eq=False)
class LayerClasses:
    """float64 [d_ff]: `rates` and `bits`; of each class, bool [d_ff] `members` and float64 [d_ff] `scores` of all
    neurons, members or not: the rate, the recall of the best key, the bits. `let_go`: neurons whose
    tokens are not looked at any further."""

    layer: int
    rates: Tensor
    bits: Tensor
    tokens: BestKeys
    pairs: BestKeys | None
    members: dict[NeuronClass, Tensor]
    scores: dict[NeuronClass, Tensor]
    let_go: int


def classify(counts: LayerCounts, rules: Rules) -> LayerClasses:
    fired = counts.fired
    rates = fired.double() / counts.total
    bits = position_bits(counts.rows, counts.by_bin)
    tokens = best_keys(counts.tokens, fired, rules)
    pairs = None if counts.pairs is None else best_keys(counts.pairs, fired, rules)
    members = {
        NeuronClass.DEAD: fired == 0,
        NeuronClass.RARE: (fired > 0) & (rates < rules.rare_below),
        NeuronClass.ALWAYS: rates >= rules.always_from,
        NeuronClass.TOKEN: tokens.detects,
        NeuronClass.POSITIONAL: bits >= rules.positional_from,
    }
    scores = {
        NeuronClass.DEAD: rates,
        NeuronClass.RARE: rates,
        NeuronClass.ALWAYS: rates,
        NeuronClass.TOKEN: tokens.recall,
        NeuronClass.POSITIONAL: bits,
    }
    if pairs is not None:
        members[NeuronClass.NGRAM] = pairs.detects & ~tokens.detects
        scores[NeuronClass.NGRAM] = pairs.recall
    let_go = int(counts.tokens.triggers.let_go.sum())
    return LayerClasses(counts.layer, rates, bits, tokens, pairs, members, scores, let_go)


def position_bits(rows: Tensor, by_bin: Tensor) -> Tensor:
    """Returns I in bits, float64 [d_ff], of rows int64 [bins] and firings int64 [bins, d_ff]."""
    total = int(rows.sum())
    fires = by_bin.double()
    cells = torch.stack((fires, rows[:, None] - fires))  # [2, bins, d_ff]
    values = cells.sum(1)
    expected = values[:, None] * (rows.double() / total)[:, None]
    # An empty cell adds nothing, also where its bin or its value is empty.
    ratio = torch.where(cells > 0, cells / expected, 1.0)
    nats = (cells * ratio.log()).sum((0, 1)) / total
    degrees = (cells > 0).sum((0, 1)) - (values > 0).sum(0) - int((rows > 0).sum()) + 1
    return ((nats - degrees.double() / (2 * total)) / math.log(2)).clamp_min(0)


def best_keys(counts: KeyCounts, fired: Tensor, rules: Rules) -> BestKeys:
    """Of the keys that a neuron detects, or else of all that come often enough, the one with the largest recall."""
    triggers, occurrences = counts.triggers, counts.occurrences
    at_key = triggers.counts - triggers.errors
    usable = (triggers.keys != NO_KEY) & (occurrences >= rules.min_occurrences) & ~triggers.let_go[:, None]
    recall = torch.where(usable, at_key / occurrences.clamp_min(1).double(), 0.0)
    elsewhere = torch.where(usable, 1 - at_key / fired.clamp_min(1).double()[:, None], 0.0)
    detects = usable & (recall >= rules.recall) & (elsewhere <= rules.elsewhere)
    # A recall is at most 1. Of equal ones the first, with the larger count.
    best = (recall + 2 * detects).argmax(1, keepdim=True)

    def own(values: Tensor) -> Tensor:
        return values.gather(1, best)[:, 0]

    usable = own(usable)
    keys = torch.where(usable, own(triggers.keys), NO_KEY)
    at_key, occurrences = (torch.where(usable, own(each), 0) for each in (at_key, occurrences))
    return BestKeys(keys, at_key, occurrences, own(recall), own(elsewhere), own(detects))
