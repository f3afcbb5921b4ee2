"""What scores the tokens of texts: a vector, a probe or a feature of an autoencoder.

    vector    h · v / |v|
    probe     its calibrated log-odds of its target, logit p, of the states of all of its layers; of a ridge its number
    feature   f(h), the activation of the feature

Each is made of values at layers, Rows. A probe joins them: s = g(Σ_l rows_l(h_l)). Pooled, a text has

    last, mean   g of the pooled values: the probe of the pooled states, as it was trained
    max          the largest g over single tokens
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoders import FeatureRows
from patchclamp_server.artifacts.probes import Doubles, Probe
from patchclamp_server.model.sites import Site

Join = Callable[[Doubles], Doubles]


@dataclass(frozen=True, eq=False)
class Rows:
    """Values [tokens, k] of states [tokens, width]: p = h · weight^T + bias where p > jump, else 0. `weight` is
    [k, width], and `bias` and `jump` are [k]."""

    weight: Tensor
    bias: Tensor
    jump: Tensor

    @classmethod
    def linear(cls, weight: Tensor, bias: Tensor | None = None) -> "Rows":
        """Returns rows that are no features: all p are above their jump."""
        zeros = torch.zeros(len(weight))
        return cls(weight, zeros if bias is None else bias, torch.full_like(zeros, -torch.inf))

    @classmethod
    def cat(cls, parts: "list[Rows]") -> "Rows":
        columns = zip(*((part.weight, part.bias, part.jump) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def __len__(self) -> int:
        return len(self.weight)

    def values(self, states: Tensor) -> Tensor:
        weight, bias, jump = (each.to(states.device) for each in (self.weight, self.bias, self.jump))
        p = states @ weight.T + bias
        return torch.where(p <= jump, 0.0, p)


@dataclass(frozen=True, eq=False)
class Detector:
    """`name`: as it was asked for. `feature`: of the autoencoder of that name. `rows`: by layer, ascending. `join`
    makes scores [n] of the sums [n, k] over layers; None where the one value of the one layer is the score."""

    name: str
    site: Site
    rows: Mapping[int, Rows]
    feature: int | None = None
    join: Join | None = None

    @property
    def layer(self) -> int:
        """The layer that is reported: the last one."""
        return max(self.rows)


def of_vector(name: str, site: Site, layer: int, v: Tensor) -> Detector:
    """v [width], which is not zero."""
    return Detector(name, site, {layer: Rows.linear((v.double() / v.double().norm()).float()[None])})


def of_feature(name: str, site: Site, layer: int, row: FeatureRows) -> Detector:
    """`row`: of one feature."""
    return Detector(name, site, {layer: Rows(row.encoder, row.folded_bias, row.threshold)}, feature=row.features[0])


def of_probe(name: str, probe: Probe) -> Detector:
    score = probe.target_score()
    matrices: Mapping[int, Doubles] = probe.weights
    bias, join = probe.bias, probe.log_odds
    if score is not None:
        matrices = {layer: row[None] for layer, row in score.directions.items()}
        bias, join = np.array([score.bias]), _first
    last = probe.layers[-1]
    # The bias is added once.
    rows = {
        layer: Rows.linear(_floats(matrices[layer]), _floats(bias) if layer == last else None) for layer in probe.layers
    }
    return Detector(name, probe.site, rows, join=None if score is not None and len(rows) == 1 else join)


def _first(scores: Doubles) -> Doubles:
    found: Doubles = scores[:, 0]
    return found


def _floats(array: Doubles) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
