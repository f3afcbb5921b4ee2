"""From the counts of a census to what it returns: sets by class, stored with their controls; detectors; layers.

The control of a set is the mean of the same score over random sets of equal size matched by layer. It is their
expectation, so that nothing is drawn: the mean over the other neurons of each layer, weighted as the set is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.census_classes import BestKeys, LayerClasses, NeuronClass, Rules, classify
from patchclamp_server.analysis.neurons.census_controls import random_detectors, random_positions
from patchclamp_server.analysis.neurons.census_counts import Counters, LayerCounts
from patchclamp_server.analysis.neurons.stored import best_of
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet

MOST_LISTED = 1000
# 1 - 0.05^(1/N) is about 3 / N: a neuron that never fired in N independent tokens has, at 95 %, a rate below that.
_RULE_OF_THREE = 3.0


@dataclass(frozen=True)
class Detector:
    """`tokens`: one, or a pair that ends with the one fired at."""

    neuron: Neuron
    tokens: tuple[int, ...]
    occurrences: int
    fired: int
    recall: float
    elsewhere: float


@dataclass(frozen=True)
class Positional:
    """`rates` by bin; 0 of a bin that no token came of."""

    neuron: Neuron
    bits: float
    rates: tuple[float, ...]


@dataclass(frozen=True)
class LayerRow:
    """The neurons of a layer by class, those of classes that were not asked for 0, and the mean of their rates."""

    layer: int
    neurons: int
    members: dict[NeuronClass, int]
    mean_rate: float


@dataclass(frozen=True, eq=False)
class Classes:
    """`sets`: of the classes that have any neuron, with the evidence of each. `detectors` of tokens, then of pairs."""

    layers: list[LayerRow]
    sets: dict[NeuronClass, tuple[NeuronSet, dict[str, Any]]]
    detectors: list[Detector]
    positional: list[Positional]


def classes_of(counters: Counters, rules: Rules) -> Classes:
    """Raises KeyError where no token has come."""
    found, controls = [], _Controls(rules)
    for layer in counters.layers:
        counts = counters.of_layer(layer)
        found.append(classify(counts, rules))
        controls.add(counts, found[-1])
    of_class = controls.of_class(counters)
    sets = {}
    for each in [each for each in NeuronClass if each in found[0].members]:
        own, measured = _set(found, each)
        if own.neurons:
            sets[each] = own, {**measured, **of_class.get(each, {})}
    return Classes([_row(each) for each in found], sets, _detectors(found, counters), _positional(found, counters))


class _Controls:
    """Gathers what the controls need, layer by layer."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._fired: list[Tensor] = []
        self._neurons, self._bits, self._most = 0, 0.0, 0.0
        self._let_go, self._total = 0, 0

    def add(self, counts: LayerCounts, found: LayerClasses) -> None:
        neurons, bits, most = random_positions(counts.rows, found.rates, counts.layer, self._rules)
        self._neurons, self._bits, self._most = self._neurons + neurons, self._bits + bits, max(self._most, most)
        self._fired.append(counts.fired)
        self._let_go, self._total = self._let_go + found.let_go, counts.total

    def of_class(self, counters: Counters) -> dict[NeuronClass, dict[str, Any]]:
        fired, seen = torch.cat(self._fired).numpy(), counters.occurrences
        tokens, pairs = (
            {
                "random_firing": {"detectors_at_most": random_detectors(fired, self._total, keys, self._rules)},
                "neurons_let_go": self._let_go,
            }
            for keys in (seen.by_token(), seen.by_hash())
        )
        random_bits = {"neurons": self._neurons, "mean_bits": self._bits / len(fired), "most_bits": self._most}
        return {
            NeuronClass.DEAD: {"rate_below_at_95_percent": _RULE_OF_THREE / self._total},
            NeuronClass.TOKEN: tokens,
            NeuronClass.NGRAM: pairs,
            NeuronClass.POSITIONAL: {"random_firing": random_bits},
        }


def _set(found: Sequence[LayerClasses], each: NeuronClass) -> tuple[NeuronSet, dict[str, Any]]:
    members = torch.stack([layer.members[each] for layer in found])
    scores = torch.stack([layer.scores[each] for layer in found])
    own = best_of(torch.where(members, scores, -torch.inf), [layer.layer for layer in found], int(members.sum()))
    # Layers of which all neurons are members have none to draw from.
    weights = members.sum(1).double() * (~members).any(1)
    others = (scores * ~members).sum(1) / (~members).sum(1).clamp_min(1)
    measured: dict[str, Any] = {"neurons": len(own.neurons), "neurons_of_all_layers": members.numel()}
    if own.neurons:
        measured["mean_score"] = float(scores[members].mean())
    if float(weights.sum()):
        measured["mean_score_of_random_sets"] = float((weights @ others) / weights.sum())
    return own, measured


def _row(found: LayerClasses) -> LayerRow:
    members = {each: int(own.sum()) for each, own in found.members.items()}
    return LayerRow(found.layer, len(found.rates), members, float(found.rates.mean()))


def _detectors(found: Sequence[LayerClasses], counters: Counters) -> list[Detector]:
    vocab = counters.occurrences.vocab
    tokens = [(layer.layer, layer.tokens, layer.members[NeuronClass.TOKEN]) for layer in found]
    pairs = [(layer.layer, layer.pairs, layer.members[NeuronClass.NGRAM]) for layer in found if layer.pairs is not None]
    return [
        *_listed(tokens, lambda key: (key,)),
        *_listed(pairs, lambda key: divmod(key, vocab)),
    ]


def _listed(found: Sequence[tuple[int, BestKeys, Tensor]], ids: Any) -> list[Detector]:
    every = [
        Detector(
            Neuron(layer, i),
            ids(int(best.keys[i])),
            int(best.occurrences[i]),
            int(best.fired[i]),
            float(best.recall[i]),
            float(best.elsewhere[i]),
        )
        for layer, best, members in found
        for i in members.nonzero()[:, 0].tolist()
    ]
    return sorted(every, key=lambda detector: -detector.recall)[:MOST_LISTED]


def _positional(found: Sequence[LayerClasses], counters: Counters) -> list[Positional]:
    bits = torch.stack([torch.where(f.members[NeuronClass.POSITIONAL], f.bits, -torch.inf) for f in found])
    listed = []
    own = {layer.layer: layer for layer in found}
    best = best_of(bits, [layer.layer for layer in found], MOST_LISTED)
    counts = {layer: counters.of_layer(layer) for layer in best.by_layer()}
    for neuron in best.neurons:
        of_layer = counts[neuron.layer]
        rates = of_layer.by_bin[:, neuron.neuron].double() / of_layer.rows.clamp_min(1)
        listed.append(Positional(neuron, float(own[neuron.layer].bits[neuron.neuron]), tuple(rates.tolist())))
    return listed
