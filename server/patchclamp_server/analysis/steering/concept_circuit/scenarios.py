"""Texts of scenarios, each written for every value of a concept, and the contrast of a value with all of them.

    c_s(f) = mean over texts of the target in s of f - mean over values v of (mean over texts of v in s of f)
    c(f)   = mean over scenarios of c_s(f)

What a scenario is about is in the texts of all its values, and so not in the contrast: it is the same in every context.
Of f = the state at a layer it is the direction of the target there, of f = what a neuron or head writes its part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp_server.analysis.activations import Roles
from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.steering.evidence import Sides


@dataclass(frozen=True)
class ScenarioText:
    """Token ids of a text of one value of one scenario, both numbered from 0 on."""

    ids: tuple[int, ...]
    scenario: int
    value: int
    roles: Roles = None


@dataclass(frozen=True, eq=False)
class Scenarios:
    """`texts`: at least one of every value in every scenario, in order of scenarios. `values`: two names at least."""

    texts: tuple[ScenarioText, ...]
    values: tuple[str, ...]
    target: int

    def __len__(self) -> int:
        return 1 + max(text.scenario for text in self.texts)

    @cached_property
    def _places(self) -> dict[tuple[int, int], list[int]]:
        """The texts of each value of each scenario, by (scenario, value)."""
        places: dict[tuple[int, int], list[int]] = {}
        for i, text in enumerate(self.texts):
            places.setdefault((text.scenario, text.value), []).append(i)
        return places

    def of(self, scenarios: Sequence[int]) -> list[int]:
        """Returns the numbers of the texts of these scenarios, in order of the scenarios given."""
        return [i for s in scenarios for v in range(len(self.values)) for i in self._places[s, v]]

    def contrast(self, scenarios: Sequence[int]) -> Tensor:
        """Returns the weight of every text in the contrast of these scenarios, float64 [texts]; their sum is 0."""
        weights = torch.zeros(len(self.texts), dtype=torch.float64)
        for s in scenarios:
            for v in range(len(self.values)):
                own = self._places[s, v]
                share = float(v == self.target) - 1 / len(self.values)
                weights[own] = share / len(own) / len(scenarios)
        return weights

    def target_mean(self, scenarios: Sequence[int]) -> Tensor:
        """Returns the weight of every text in the mean of the target's texts, float64 [texts], scenarios alike."""
        weights = torch.zeros(len(self.texts), dtype=torch.float64)
        for s in scenarios:
            own = self._places[s, self.target]
            weights[own] = 1 / len(own) / len(scenarios)
        return weights

    def pairs(self, scenarios: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the texts of pairs, of the target and of another value of the same scenario.

        In each scenario the texts of the fewer are taken again by turns, until each of the others has been in a pair.
        """
        positive, negative = [], []
        for s in scenarios:
            target = self._places[s, self.target]
            others = [i for v in range(len(self.values)) if v != self.target for i in self._places[s, v]]
            n = max(len(target), len(others))
            positive += [target[i % len(target)] for i in range(n)]
            negative += [others[i % len(others)] for i in range(n)]
        return positive, negative

    def digest(self) -> str:
        """Of the token ids of all texts, with scenario and value."""
        return json_digest([[text.scenario, text.value, text.ids] for text in self.texts])


def sides(states: Tensor, pairs: tuple[list[int], list[int]]) -> Sides:
    """Returns both sides of pairs of texts whose states are [texts, layers, d]."""
    return Sides(states[pairs[0]], states[pairs[1]])
