"""k-sparse probes: how well k neurons together tell the texts of a label.

    p(label | x) = sigmoid(w · s(x) + b)     logistic regression on the k neurons that a ranker puts first; s:
                                             standardised by mean and deviation of the training texts
    F1, precision and recall on held-out texts, beside probes on k random neurons

Rankers, on the training texts: the difference of means over the deviation within both kinds; F of an analysis of
variance; mutual information of the label and the activation in 8 bins of equal counts; or the sizes of the weights of a
logistic regression with an L1 penalty, among the PREFILTERED best by mean difference.

Source: Gurnee et al. 2023, Finding Neurons in a Haystack: Case Studies with Sparse Probing.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
BINS = 8
PREFILTERED = 2000


class Ranker(Enum):
    """The names of the enum NeuronRanker, in lower case and without its prefix."""

    MEAN_DIFFERENCE = "mean_difference"
    F = "f"
    MUTUAL_INFORMATION = "mutual_information"
    L1 = "l1"


@dataclass(frozen=True)
class Probe:
    """`units`: places of its neurons among those that were ranked, with their weights on standardised activations."""

    units: tuple[int, ...]
    weights: tuple[float, ...]
    intercept: float
    f1: float
    precision: float
    recall: float
    random_f1: tuple[float, ...]


def ranked(ranker: Ranker, x: Floats, y: Bools, seed: int) -> NDArray[np.int64]:
    """Returns the places of all units of x [texts, units], the best first, equal ones by place. y: [texts]."""
    return np.argsort(-RANKERS[ranker](x, y, seed), kind="stable").astype(np.int64)


def probe(
    x: Floats, y: Bools, heldout: tuple[Floats, Bools], units: Sequence[int], random: Sequence[Sequence[int]], seed: int
) -> Probe:
    """Fits a probe on the chosen units of x [texts, units], and on every random set; scores all on held-out texts."""
    fitted, scores = _fit(x, y, heldout, units, seed)
    others = tuple(_fit(x, y, heldout, each, seed)[1][2] for each in random)
    weights = tuple(float(w) for w in fitted.coef_[0])
    precision, recall, f1 = scores
    return Probe(tuple(units), weights, float(fitted.intercept_[0]), f1, precision, recall, others)


def _fit(
    x: Floats, y: Bools, heldout: tuple[Floats, Bools], units: Sequence[int], seed: int
) -> tuple[LogisticRegression, tuple[float, float, float]]:
    own = np.asarray(units)
    mean, deviation = x[:, own].mean(0), x[:, own].std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    model = LogisticRegression(max_iter=1000, class_weight="balanced", random_state=seed % 2**32)
    with warnings.catch_warnings():
        # A probe that has not converged is scored as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((x[:, own] - mean) / deviation, y)
    predicted = model.predict((heldout[0][:, own] - mean) / deviation)
    precision, recall, f1, _ = precision_recall_fscore_support(
        heldout[1], predicted, average="binary", zero_division=0.0
    )
    return model, (float(precision), float(recall), float(f1))


def _mean_difference(x: Floats, y: Bools, seed: int) -> NDArray[np.float64]:
    target, other = x[y].astype(np.float64), x[~y].astype(np.float64)
    within = np.sqrt((target.var(0) * len(target) + other.var(0) * len(other)) / len(x))
    apart = np.abs(target.mean(0) - other.mean(0))
    found: NDArray[np.float64] = np.divide(apart, within, out=np.zeros_like(apart), where=within > 0)
    return found


def _f(x: Floats, y: Bools, seed: int) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # A constant unit has no F.
        warnings.simplefilter("ignore", UserWarning)
        values, _ = f_classif(x, y)
    found: NDArray[np.float64] = np.nan_to_num(values, nan=0.0, posinf=np.finfo(np.float64).max)
    return found


def _mutual_information(x: Floats, y: Bools, seed: int) -> NDArray[np.float64]:
    """I(bin; y) in nats of each unit, by counts."""
    ranks = np.argsort(np.argsort(x, axis=0, kind="stable"), axis=0, kind="stable")
    bins = ranks * BINS // len(x)  # [texts, units]
    found = np.zeros(x.shape[1])
    for kind in (y, ~y):
        share = kind.mean()
        for b in range(BINS):
            joint = (bins[kind] == b).sum(0) / len(x)
            marginal = (bins == b).mean(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                found += np.where(joint > 0, joint * np.log(joint / (marginal * share)), 0.0)
    return found


def _l1(x: Floats, y: Bools, seed: int) -> NDArray[np.float64]:
    first = np.argsort(-_mean_difference(x, y, seed), kind="stable")[:PREFILTERED]
    mean, deviation = x[:, first].mean(0), x[:, first].std(0)
    model = LogisticRegression(
        l1_ratio=1.0, solver="liblinear", max_iter=200, class_weight="balanced", random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((x[:, first] - mean) / np.where(deviation > 0, deviation, 1.0), y)
    found = np.zeros(x.shape[1])
    found[first] = np.abs(model.coef_[0])
    return found


RANKERS: Mapping[Ranker, Callable[[Floats, Bools, int], NDArray[np.float64]]] = {
    Ranker.MEAN_DIFFERENCE: _mean_difference,
    Ranker.F: _f,
    Ranker.MUTUAL_INFORMATION: _mutual_information,
    Ranker.L1: _l1,
}
