"""k-sparse probes: how well k neurons together tell the texts of a label.

    p(label | x) = sigmoid(w · s(x) + b)     logistic regression on the k neurons that a ranker puts first; s:
                                             standardised by mean and deviation of the training texts
    F1, precision and recall on held-out texts, beside probes on k random neurons

Rankers, on the training texts: the difference of means over the deviation within both kinds; F of an analysis of
variance; mutual information of the label and the activation in 8 bins of equal counts, equal activations in one; or
the sizes of the weights of a logistic regression with an L1 penalty, among the PREFILTERED best by mean difference.

Source: Gurnee et al. 2023, Finding Neurons in a Haystack: Case Studies with Sparse Probing.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
BINS = 8
PREFILTERED = 2000
LARGEST = float(np.finfo(np.float64).max)
# Bounds the memory of copies in float64.
UNITS_AT_ONCE = 1024


class Ranker(Enum):
    """The names of the enum NeuronRanker, in lower case and without its prefix."""

    MEAN_DIFFERENCE = "mean_difference"
    F = "f"
    MUTUAL_INFORMATION = "mutual_information"
    L1 = "l1"


class Kinds(NamedTuple):
    """Activations x [texts, units] of texts, and whether each is the target's, y [texts]."""

    x: Floats
    y: Bools


@dataclass(frozen=True)
class Probe:
    """`weights` of its units on standardised activations; scores on held-out texts."""

    weights: tuple[float, ...]
    intercept: float
    f1: float
    precision: float
    recall: float


def ranked(ranker: Ranker, texts: Kinds, seed: int) -> NDArray[np.int64]:
    """Returns the places of all units, the best first, equal ones by place."""
    return np.argsort(-scores(ranker, texts, seed), kind="stable").astype(np.int64)


def scores(ranker: Ranker, texts: Kinds, seed: int) -> NDArray[np.float64]:
    """Returns what a ranker gives each unit [units]."""
    if ranker is Ranker.L1:
        return _l1(texts, seed)
    one = BY_UNIT[ranker]
    starts = range(0, texts.x.shape[1], UNITS_AT_ONCE)
    return np.concatenate([one(texts.x[:, start : start + UNITS_AT_ONCE], texts.y) for start in starts])


def fit(texts: Kinds, heldout: Kinds, units: Sequence[int], seed: int) -> Probe:
    """Returns the probe on these units, fitted to `texts` and scored on `heldout`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_fscore_support

    own = texts.x[:, np.asarray(units)].astype(np.float64)
    mean, deviation = own.mean(0), _deviation(own)
    model = LogisticRegression(max_iter=1000, class_weight="balanced", random_state=seed % 2**32)
    with warnings.catch_warnings():
        # A probe that has not converged is scored as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((own - mean) / deviation, texts.y)
    predicted = model.predict((heldout.x[:, np.asarray(units)] - mean) / deviation)
    precision, recall, f1, _ = precision_recall_fscore_support(
        heldout.y, predicted, average="binary", zero_division=0.0
    )
    weights = tuple(float(w) for w in model.coef_[0])
    return Probe(weights, float(model.intercept_[0]), float(f1), float(precision), float(recall))


def _deviation(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each unit; 1 for a constant one, which is 0 after its mean is taken."""
    found: NDArray[np.float64] = x.std(0)
    return np.where(found > 0, found, 1.0)


def _mean_difference(x: Floats, y: Bools) -> NDArray[np.float64]:
    target, other = x[y].astype(np.float64), x[~y].astype(np.float64)
    within = np.sqrt((target.var(0) * len(target) + other.var(0) * len(other)) / len(x))
    apart = np.abs(target.mean(0) - other.mean(0))
    return _ratio(apart, within)


def _f(x: Floats, y: Bools) -> NDArray[np.float64]:
    from sklearn.feature_selection import f_classif

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # A constant unit has no F.
        warnings.simplefilter("ignore", UserWarning)
        values, _ = f_classif(x.astype(np.float64), y)
    found: NDArray[np.float64] = np.nan_to_num(values, nan=0.0, posinf=LARGEST)
    return found


def _ratio(apart: NDArray[np.float64], within: NDArray[np.float64]) -> NDArray[np.float64]:
    """`apart` over `within`; LARGEST where only the latter is 0, and 0 where both are."""
    found: NDArray[np.float64] = np.where(apart > 0, LARGEST, 0.0)
    return np.divide(apart, within, out=found, where=within > 0)


def _mutual_information(x: Floats, y: Bools) -> NDArray[np.float64]:
    """I(bin; y) in nats of each unit, by counts."""
    ordered = np.sort(x, axis=0)
    # Edges are values, so that equal activations share a bin.
    edges = ordered[[len(x) * b // BINS for b in range(1, BINS)]]
    bins = (x[None] >= edges[:, None]).sum(0)  # [texts, units]
    found = np.zeros(x.shape[1])
    for kind in (y, ~y):
        share = kind.mean()
        for b in range(BINS):
            joint = (bins[kind] == b).sum(0) / len(x)
            marginal = (bins == b).mean(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                found += np.where(joint > 0, joint * np.log(joint / (marginal * share)), 0.0)
    return found


def _l1(texts: Kinds, seed: int) -> NDArray[np.float64]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    first = ranked(Ranker.MEAN_DIFFERENCE, texts, seed)[:PREFILTERED]
    own = texts.x[:, first].astype(np.float64)
    model = LogisticRegression(
        l1_ratio=1.0, solver="liblinear", max_iter=200, class_weight="balanced", random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((own - own.mean(0)) / _deviation(own), texts.y)
    found = np.zeros(texts.x.shape[1])
    found[first] = np.abs(model.coef_[0])
    return found


BY_UNIT: Mapping[Ranker, Callable[[Floats, Bools], NDArray[np.float64]]] = {
    Ranker.MEAN_DIFFERENCE: _mean_difference,
    Ranker.F: _f,
    Ranker.MUTUAL_INFORMATION: _mutual_information,
}
