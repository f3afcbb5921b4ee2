"""AUROC, average precision, Platt scaling and reliability against scikit-learn and numpy."""

import numpy as np
import pytest
from sklearn.calibration import _SigmoidCalibration, calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from patchclamp_server.analysis.calibration import platt
from patchclamp_server.analysis.steering.detection.job import reliability
from patchclamp_server.analysis.steering.detection.ranking import auroc, ranking


def drawn(n: int, apart: float, seed: int, digits: int = 9) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = generator.random(n) < 0.4
    y[:2] = True, False
    return np.round(generator.normal(y * apart, 1.0), digits), y


@pytest.mark.parametrize(("n", "apart", "digits"), [(7, 0.5, 9), (80, 1.0, 9), (80, 1.0, 0), (301, -0.7, 1)])
def test_the_measures_of_a_ranking_are_those_of_scikit_learn(n: int, apart: float, digits: int):
    scores, y = drawn(n, apart, seed=n, digits=digits)
    found = ranking(scores, y, seed=0)
    assert found.auroc.mean == pytest.approx(roc_auc_score(y, scores))
    assert auroc(scores, y) == found.auroc.mean
    assert found.average_precision.mean == pytest.approx(average_precision_score(y, scores))


def test_the_intervals_are_those_of_resampled_texts():
    scores, y = drawn(60, 0.8, seed=5, digits=1)
    found = ranking(scores, y, seed=1)
    generator = np.random.default_rng(2)
    samples = []
    for _ in range(600):
        at = np.concatenate([generator.choice(np.flatnonzero(kind), kind.sum()) for kind in (y, ~y)])
        samples.append((roc_auc_score(y[at], scores[at]), average_precision_score(y[at], scores[at])))
    low, high = np.quantile(np.array(samples), [0.025, 0.975], axis=0)
    assert (found.auroc.low, found.auroc.high) == pytest.approx((low[0], high[0]), abs=0.03)
    assert (found.average_precision.low, found.average_precision.high) == pytest.approx((low[1], high[1]), abs=0.04)


def test_scores_that_tell_all_apart_have_an_auroc_of_one_without_an_interval():
    y = np.array([True, True, False, False])
    found = ranking(np.array([3.0, 2.0, 1.0, 0.0]), y, seed=0)
    assert (found.auroc.mean, found.auroc.low, found.auroc.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("n", "apart", "scale"), [(30, 1.0, 1.0), (200, 0.3, 500.0), (50, -2.0, 1e-3), (20, 40.0, 1.0)]
)
def test_probabilities_are_those_of_platt_in_scikit_learn(n: int, apart: float, scale: float):
    scores, y = drawn(n, apart, seed=n)
    scores = scores * scale + 7 * scale
    found = platt(scores, y)
    theirs = _SigmoidCalibration().fit(scores, y)
    assert found.probabilities(scores) == pytest.approx(theirs.predict(scores), abs=2e-4)
    assert np.sign(found.slope) == np.sign(apart)


@pytest.mark.parametrize(("score", "times"), [(2.5, 1), (0.1, 1), (1 / 3, 4), (-123.456, 5), (0.0, 2)])
def test_scores_without_a_difference_get_the_base_rate(score: float, times: int):
    """Also where the mean of equal numbers is another one, by rounding."""
    y = np.array([True, False, False] * times)
    found = platt(np.full(len(y), score), y)
    assert found.slope == 0.0
    # (n + 1) / (n + 2) targets of n texts of the label, 1 / (m + 2) of m others.
    base = ((times + 1) / (times + 2) + 2 / (2 * times + 2)) / 3
    assert found.probabilities(np.array([9.0]))[0] == pytest.approx(base)


def test_reliability_is_the_calibration_curve_of_scikit_learn():
    generator = np.random.default_rng(0)
    p = generator.random(400)
    y = (generator.random(400) < p**2).astype(float)
    bins = reliability(p, y)
    share, mean = calibration_curve(y, p, n_bins=10)
    assert [each.share for each in bins] == pytest.approx(share.tolist())
    assert [each.mean_probability for each in bins] == pytest.approx(mean.tolist())
    assert sum(each.texts for each in bins) == 400
    assert [each.low for each in bins] == pytest.approx([b / 10 for b in range(10)])
    assert reliability(np.array([1.0]), np.array([1.0]))[0].high == 1.0
    assert brier_score_loss(y, p) == pytest.approx(np.mean((p - y) ** 2))
