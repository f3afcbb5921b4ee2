"""The readout probe, and conditions on a probability: a trained probe at single tokens, as projections of states.

    score of a row u_k         s_k = Σ_l |A_lk| (h_l · u_lk) + a_k      u_lk = A_lk / |A_lk|: what `projection` reads
    two labels                 p = 1 / (1 + exp(-s)) for s = calibrated log-odds of the target, one row
    more labels                p of softmax(s), calibrated (artifacts/probes.py)
    p > t                      h · u > (logit t - a) / |A|              a condition is one projection at one layer

Kernels and rules know nothing of probes: they read projections and compare them, and the rest is arithmetic on the
host. A probability of more layers or labels than that is no single projection: a condition on it is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.probes import Doubles, Probe, TargetScore
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.interventions.bound import BoundCondition
from patchclamp_server.interventions.columns import EntryKind
from patchclamp_server.interventions.kinds.kind import ReadoutTable
from patchclamp_server.interventions.kinds.readings import PROJECTION
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, ReadoutSpec, Where
from patchclamp_server.interventions.program import Comparison, Condition, ProbeReadout
from patchclamp_server.interventions.resolver import Resolver, check_finite
from patchclamp_server.model.sites import Site

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb

DEFAULT_THRESHOLD = 0.5


def units_of(rows: Doubles) -> tuple[Tensor, Doubles]:
    """Returns rows [n, width] divided by their lengths, in float32, and the lengths [n]. A row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / np.where(lengths > 0, lengths, 1.0)[:, None]
    return torch.from_numpy(units.astype(np.float32)), lengths


@dataclass(frozen=True, eq=False)
class TargetReader:
    """Makes of one projection a layer the probability of the target, of two labels if asked for that of both."""

    lengths: tuple[float, ...]
    bias: float
    is_number: bool
    # The place of the target among both labels; None where it alone is asked for.
    place: int | None

    @property
    def fingerprint(self) -> bytes:
        return repr(self).encode()

    def __call__(self, numbers: Sequence[float]) -> tuple[float, ...]:
        score = self.bias
        for length, number in zip(self.lengths, numbers, strict=True):
            score += length * number
        if self.is_number:
            return (score,)
        own, other = _both(score)
        return (own,) if self.place is None else (own, other) if self.place == 0 else (other, own)


@dataclass(frozen=True, eq=False)
class ClassReader:
    """Makes of a projection for each layer and label the probability of the target, or of all labels."""

    probe: Probe
    lengths: Doubles  # [layers, classes]
    all_classes: bool

    @property
    def fingerprint(self) -> bytes:
        probe = self.probe
        said = repr((probe.target, probe.calibration, self.all_classes)).encode()
        return said + probe.bias.tobytes() + self.lengths.tobytes()

    def __call__(self, numbers: Sequence[float]) -> tuple[float, ...]:
        by_layer = np.array(numbers).reshape(self.lengths.shape)
        found = self.probe.probabilities((self.lengths * by_layer).sum(axis=0, keepdims=True) + self.probe.bias)[0]
        return tuple(found.tolist()) if self.all_classes else (float(found[self.probe.target]),)


def _both(log_odds: float) -> tuple[float, float]:
    """Returns p and 1 - p, without overflow, and each without loss where it is small."""
    small = math.exp(-abs(log_odds))
    likelier, other = 1.0 / (1.0 + small), small / (1.0 + small)
    return (likelier, other) if log_odds >= 0 else (other, likelier)


def _place(kind: ProbeReadout, resolver: Resolver, path: str) -> tuple[Site, tuple[int, ...]]:
    probe = resolver.probe(kind.probe, f"{path}.probe")
    return probe.site, probe.layers


def _decode(proto: "pb.ProbeReadout", field: str) -> ProbeReadout:
    if not proto.probe:
        raise InvalidArgument(f"{field}.probe", "expected the id or tag of a probe")
    return ProbeReadout(proto.probe, proto.all_classes)


def _bind(kind: ProbeReadout, where: Where) -> ReadoutNumbers:
    probe = where.resolver.probe(kind.probe, f"{where.path}.probe")
    if kind.all_classes and probe.is_number:
        raise InvalidArgument(f"{where.path}.all_classes", f"{kind.probe} reads a number and has no classes")
    score = probe.target_score()
    if score is None:
        each = {layer: units_of(rows) for layer, rows in probe.weights.items()}
        lengths = np.stack([each[layer][1] for layer in probe.layers])
        reader = ClassReader(probe, lengths, kind.all_classes)
        return ReadoutNumbers({layer: units for layer, (units, _) in each.items()}, joint=reader)
    each = {layer: units_of(row[None]) for layer, row in score.directions.items()}
    sizes = tuple(float(each[layer][1][0]) for layer in probe.layers)
    place = probe.target if kind.all_classes else None
    joint = TargetReader(sizes, score.bias, score.is_number, place)
    return ReadoutNumbers({layer: units for layer, (units, _) in each.items()}, joint=joint)


def single_score(probe: Probe, ref: str, path: str) -> TargetScore:
    """Returns the score of a probe that is one projection of one layer. Raises FailedPrecondition for another one."""
    score = probe.target_score()
    if score is None:
        message = (
            f"{ref} has {len(probe.labels)} labels, and the probability of one is no function of one projection: "
            "gates, abort conditions and watches take probes of two labels or of a number; a readout reads this one"
        )
        raise FailedPrecondition(path, message)
    if len(probe.layers) > 1:
        message = (
            f"{ref} reads layers {', '.join(map(str, probe.layers))} together, and gates, abort conditions and watches "
            "look at one layer as the forward pass goes by; a readout reads this one"
        )
        raise FailedPrecondition(path, message)
    return score


def probe_condition(condition: Condition, resolver: Resolver, path: str) -> BoundCondition:
    """Returns the comparison of a projection that is that of the probability, whose threshold 0 stands for 0.5."""
    ref = condition.probe
    probe = resolver.probe(ref, f"{path}.probe")
    score = single_score(probe, ref, f"{path}.probe")
    [layer] = probe.layers
    if condition.site not in (None, probe.site):
        raise InvalidArgument(f"{path}.site", f"expected {probe.site.value}, that of the probe, or none")
    if condition.layer != layer and (condition.site is not None or condition.layer):
        raise InvalidArgument(f"{path}.layer", f"expected {layer}, that of the probe")
    threshold = condition.threshold
    check_finite(threshold, f"{path}.threshold")
    level = threshold
    if not score.is_number:
        threshold = threshold or DEFAULT_THRESHOLD
        if not 0.0 < threshold < 1.0:
            raise InvalidArgument(f"{path}.threshold", f"expected a probability above 0 and below 1, got {threshold:g}")
        level = math.log(threshold) - math.log1p(-threshold)
    units, [length] = units_of(score.directions[layer][None])
    if not length:
        raise FailedPrecondition(f"{path}.probe", f"{ref} says the same of every activation")
    sign = 1.0 if condition.comparison is Comparison.ABOVE else -1.0
    projection = (level - score.bias) / float(length)
    return BoundCondition(probe.site, layer, units[0], sign, projection, False, condition.scope, given=threshold)


PROBE = ReadoutTable(EntryKind.PROJECTION, PROJECTION.write, PROJECTION.rule, PROJECTION.columns)

READOUTS = (ReadoutSpec("probe", ProbeReadout, _decode, _bind, ("read_probe",), PROBE, place=_place),)
