"""The report of a probe on texts that neither training nor calibration has seen, and what keeps it honest:

    accuracy        beside that of always saying the most frequent label of the training texts
    Brier           mean (p - [y = target])², after and before calibration, and that of the target's share in training
    code length     code_length.py, over the training texts; random labels have about 1
    selectivity     accuracy, or R², less the mean of the same probe's on labels dealt anew to the documents
    variance share  variance_share.py, of the states as they are

Sources: Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks; Niculescu-Mizil & Caruana 2005,
Predicting Good Probabilities with Supervised Learning (reliability).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.analysis.calibration import ReliabilityBin, reliability
from patchclamp_server.analysis.probes.fitting import Examples
from patchclamp_server.analysis.probes.method import Doubles
from patchclamp_server.artifacts.probes import Probe, log_odds, logistic


@dataclass(frozen=True)
class ProbeReport:
    """A figure that is not of the method is 0: `r_squared` is of ridge, and of what stands before it only `texts` is.
    The code length is of classifiers too."""

    texts: int
    accuracy: float = 0.0
    base_rate: float = 0.0
    brier: float = 0.0
    brier_uncalibrated: float = 0.0
    brier_base_rate: float = 0.0
    auroc: float = 0.0
    reliability: tuple[ReliabilityBin, ...] = ()
    r_squared: float = 0.0
    code_length_ratio: float = 0.0
    selectivity: float = 0.0
    variance_share: float = 0.0


def classifier_report(probe: Probe, scores: Doubles, y: NDArray[np.float64], training: Examples) -> ProbeReport:
    """Returns what is measured by scores [n, classes] of texts of the classes y [n], of which the target is some, and
    not all. The rest is 0."""
    from sklearn.metrics import roc_auc_score

    probabilities = probe.probabilities(scores)
    counts = np.bincount(training.y.astype(np.int64), minlength=training.n_classes)
    target = y == probe.target
    own, share = probabilities[:, probe.target], counts[probe.target] / counts.sum()
    return ProbeReport(
        texts=len(y),
        accuracy=float((probabilities.argmax(axis=1) == y).mean()),
        base_rate=float((y == counts.argmax()).mean()),
        brier=float(np.square(own - target).mean()),
        brier_uncalibrated=float(np.square(logistic(log_odds(scores, probe.target)) - target).mean()),
        brier_base_rate=float(np.square(share - target).mean()),
        auroc=float(roc_auc_score(target, own)),
        reliability=reliability(own, target),
    )


def r_squared(numbers: Doubles, y: Doubles) -> float:
    """Returns 1 - Σ (number - y)² / Σ (y - mean y)²; 0 where y does not vary."""
    total = float(np.square(y - y.mean()).sum())
    return 1.0 - float(np.square(numbers - y).sum()) / total if total else 0.0
