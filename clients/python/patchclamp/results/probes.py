"""Probes: what was trained, and how it reads texts that neither training nor calibration has seen."""

from dataclasses import dataclass

from patchclamp.results.artifacts import Artifact
from patchclamp.results.record import Record


@dataclass(frozen=True)
class ReliabilityBin(Record):
    """Says of texts whose probability lies in [low, high) what it is on average, and the share that has the label."""

    low: float
    high: float
    texts: int
    mean_probability: float
    share: float


@dataclass(frozen=True)
class ProbeReport(Record):
    """Says how a probe reads texts that it has not seen; r_squared is of ridge, all others but texts, selectivity and
    variance_share of classifiers.

    base_rate: accuracy of the most frequent label. brier: mean squared error of the calibrated probability, beside that
    before calibration and that of always saying the share of the target. code_length_ratio: 1 where nothing was learnt.
    selectivity: accuracy, or R², less that on labels dealt anew. variance_share: of the activations, by the labels.
    """

    texts: int
    accuracy: float
    base_rate: float
    brier: float
    brier_uncalibrated: float
    brier_base_rate: float
    auroc: float
    reliability: tuple[ReliabilityBin, ...]
    r_squared: float
    code_length_ratio: float
    selectivity: float
    variance_share: float


@dataclass(frozen=True)
class ProbeLayer(Record):
    layer: int
    score: float


@dataclass(frozen=True)
class TrainedProbe(Record):
    """Holds the stored probe with its report.

    labels: in the order of read_probe(..., all_classes=True); none of ridge. by_layer: where the layer was chosen, the
    accuracy, or R², of a probe on each alone. warnings: what to know before it is used.
    """

    artifact: Artifact
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    report: ProbeReport
    by_layer: tuple[ProbeLayer, ...] = ()
    warnings: tuple[str, ...] = ()
