"""Methods of probes, their strength, calibration and honest figures equal scikit-learn and numpy on small data."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import brier_score_loss, log_loss, r2_score, roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from patchclamp_server.analysis.calibration import platt
from patchclamp_server.analysis.probes import job, logistic, prototype, ridge
from patchclamp_server.analysis.probes.code_length import code_length_ratio
from patchclamp_server.analysis.probes.fitting import Examples, Standardised, chosen_strength, fitted, strengths
from patchclamp_server.analysis.probes.method import Fit, Method
from patchclamp_server.analysis.probes.registry import METHODS
from patchclamp_server.analysis.probes.report import classifier_report, r_squared, reliability
from patchclamp_server.analysis.probes.variance_share import variance_share
from patchclamp_server.artifacts.probes import Probe
from patchclamp_server.model.sites import Site

Doubles = NDArray[np.float64]
WIDTHS = (6, 90)  # fewer coordinates than texts, and more: those are solved in a basis of the texts


def data(width: int, n_classes: int = 2, n: int = 48, seed: int = 0) -> tuple[Doubles, Doubles]:
    generator = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    means = generator.normal(size=(n_classes, width))
    return 3.0 + means[y] + generator.normal(size=(n, width)) * np.linspace(0.5, 4.0, width), y.astype(np.float64)


def examples(y: Doubles, n_classes: int) -> Examples:
    return Examples(y, np.arange(len(y)), n_classes)


def solved(method: Method, x: Doubles, y: Doubles, n_classes: int, strength: float, at: Doubles) -> tuple[Fit, Doubles]:
    """The fit, and its scores of other states by the weights of x itself."""
    inputs, fit, used = fitted(method, x, examples(y, n_classes), strength, 0)
    assert used == strength
    return fit, (at - inputs.mean) / inputs.scale @ inputs.back(fit.matrix).T + fit.bias


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_logistic_gives_the_probabilities_of_scikit_learn(width: int, n_classes: int) -> None:
    (x, y), (other, _) = data(width, n_classes), data(width, n_classes, seed=1)
    scaler = StandardScaler().fit(x)
    wanted = LogisticRegression(C=1 / 4.0, tol=1e-8, max_iter=5000).fit(scaler.transform(x), y)
    _, scores = solved(logistic, x, y, n_classes, 4.0, other)
    np.testing.assert_allclose(softmax(scores, axis=1), wanted.predict_proba(scaler.transform(other)), atol=2e-3)


def test_a_coordinate_that_varies_by_rounding_alone_is_not_magnified() -> None:
    """Of 700 float32 resolves 6e-5; of nearly nothing it resolves what nobody could mean."""
    x, _ = data(6)
    noise = np.random.default_rng(2).normal(size=len(x))
    x[:, 1] = (700.0 + 3e-5 * noise).astype(np.float32)
    x[:, 2], x[:, 3] = 1e-40 * noise, 3.0
    assert x[:, 1].std() > 0
    inputs = Standardised.of(x)
    np.testing.assert_allclose(inputs.scale, [x[:, 0].std(), 1.0, 1.0, 1.0, x[:, 4].std(), x[:, 5].std()])


@pytest.mark.parametrize("width", WIDTHS)
def test_ridge_gives_the_numbers_of_scikit_learn(width: int) -> None:
    (x, y), (other, _) = data(width, 7), data(width, 7, seed=1)
    scaler = StandardScaler().fit(x)
    wanted = Ridge(alpha=4.0).fit(scaler.transform(x), y)
    _, scores = solved(ridge, x, y, 1, 4.0, other)
    np.testing.assert_allclose(scores[:, 0], wanted.predict(scaler.transform(other)), atol=1e-8)


@pytest.mark.parametrize("width", WIDTHS)
def test_prototypes_prefer_the_nearest_centroid_of_scikit_learn(width: int) -> None:
    (x, y), (other, _) = data(width, 3), data(width, 3, seed=1)
    scaler = StandardScaler().fit(x)
    wanted = NearestCentroid().fit(scaler.transform(x), y)
    fit, scores = solved(prototype, x, y, 3, 7.0, other)
    assert scores.argmax(1).tolist() == wanted.predict(scaler.transform(other)).tolist()
    distances = np.square(scaler.transform(other)[:, None] - wanted.centroids_).sum(2)
    np.testing.assert_allclose(softmax(scores, axis=1), softmax(-distances / 7.0, axis=1), atol=1e-8)
    assert fit.temperature == 7.0


@pytest.mark.parametrize("width", WIDTHS)
def test_other_states_are_standardised_as_the_training_texts_are(width: int) -> None:
    x, y = data(width)
    other = 5.0 + 2.0 * data(width, seed=1)[0]
    inputs, fit, _ = fitted(ridge, x, examples(y, 1), 4.0, 0)
    scaler = StandardScaler().fit(x)
    wanted = Ridge(alpha=4.0).fit(scaler.transform(x), y).predict(scaler.transform(other))
    np.testing.assert_allclose(fit.scores(inputs.turned(other))[:, 0], wanted, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_the_strength_is_the_one_with_the_smallest_loss_on_left_out_folds(name: str) -> None:
    method, n_classes = METHODS[name], 1 if name == "ridge" else 2
    x, y = data(20)
    own, inputs = examples(y, n_classes), Standardised.of(x)
    chosen = chosen_strength(method, inputs.z, own, 20, seed=5)
    generator = np.random.default_rng(5)
    folds = np.empty(len(y), dtype=int)
    for kind in (0, 1) if n_classes == 2 else (None,):
        some = generator.permutation(np.arange(len(y)) if kind is None else np.flatnonzero(y == kind))
        folds[some] = np.arange(len(some)) % 5
    losses = {}
    for strength in strengths(20):
        total = 0.0
        for fold in range(5):
            a, b = folds != fold, folds == fold
            scores = method.fit(inputs.z[a], y[a], n_classes, strength).scores(inputs.z[b])
            if n_classes == 1:
                total += np.square(scores[:, 0] - y[b]).sum()
            else:
                total += log_loss(y[b], softmax(scores, axis=1), normalize=False)
        losses[strength] = total
    assert chosen == min(losses, key=lambda strength: losses[strength])


def test_windows_of_one_document_are_in_one_fold() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(12, 40))
    documents = np.repeat(np.arange(12), 4)
    x = centres[documents] + 0.01 * generator.normal(size=(48, 40))
    y = (np.arange(12) % 2)[documents].astype(np.float64)
    # What tells documents apart says nothing of other documents: only a split within them would choose a weak penalty.
    inputs = Standardised.of(x)
    by_document = chosen_strength(logistic, inputs.z, Examples(y, documents, 2), 40, seed=0)
    by_window = chosen_strength(logistic, inputs.z, Examples(y, np.arange(48), 2), 40, seed=0)
    assert by_document > by_window


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_calibration_is_that_of_scikit_learn(scale: float) -> None:
    generator = np.random.default_rng(2)
    scores = scale * generator.normal(size=60)
    positive = generator.random(60) < expit(0.5 * scores / scale - 0.4)
    slope, intercept = platt(scores, positive)
    model = LogisticRegression(C=1e12, tol=1e-10).fit(scores[:, None], scores > 0)
    model.coef_, model.intercept_ = np.ones((1, 1)), np.zeros(1)
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="sigmoid").fit(scores[:, None], positive)
    wanted = calibrated.predict_proba(scores[:, None])[:, 1]
    np.testing.assert_allclose(expit(slope * scores + intercept), wanted, atol=1e-4)


def test_the_report_is_what_scikit_learn_measures() -> None:
    generator = np.random.default_rng(4)
    y = generator.integers(0, 3, 50).astype(np.float64)
    scores = generator.normal(size=(50, 3)) + 1.5 * np.eye(3)[y.astype(int)]
    training = examples(np.array([0, 0, 1, 1, 1, 2.0]), 3)
    probe = Probe("logistic", Site.RESID_POST, {0: np.zeros((3, 2))}, np.zeros(3), ("a", "b", "c"), 2, (0.8, -0.1))
    report = classifier_report(probe, scores, y, training)
    p, plain = probe.probabilities(scores), softmax(scores, axis=1)
    assert report.accuracy == (p.argmax(1) == y).mean()
    assert report.base_rate == (y == 1).mean()
    assert report.brier == pytest.approx(brier_score_loss(y == 2, p[:, 2]))
    assert report.brier_uncalibrated == pytest.approx(brier_score_loss(y == 2, plain[:, 2]))
    assert report.brier_base_rate == pytest.approx(brier_score_loss(y == 2, np.full(50, 1 / 6)))
    assert report.auroc == pytest.approx(roc_auc_score(y == 2, p[:, 2]))
    assert sum(b.texts for b in report.reliability) == 50


def test_reliability_bins_hold_the_mean_probability_and_the_share_of_the_target() -> None:
    bins = reliability(np.array([0.0, 0.05, 0.1, 0.95, 1.0]), np.array([False, True, False, True, True]))
    assert [(b.low, b.high, b.texts, b.share) for b in bins] == [
        (0.0, 0.1, 2, 0.5),
        (0.1, 0.2, 1, 0.0),
        (0.9, 1.0, 2, 1.0),
    ]
    assert [b.mean_probability for b in bins] == pytest.approx([0.025, 0.1, 0.975])


def test_r_squared_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(4)
    y, numbers = generator.normal(size=20), generator.normal(size=20)
    assert r_squared(numbers, y) == pytest.approx(r2_score(y, numbers))


def test_the_online_code_is_the_sum_of_its_blocks() -> None:
    x, y = data(5, n=40)
    ratio = code_length_ratio(logistic, x, examples(y, 2), 2.0, seed=9)
    order = np.random.default_rng(9).permutation(40)
    bits = 10.0  # the first ten texts by the uniform code
    for start, end in ((10, 20), (20, 40)):
        model = LogisticRegression(C=0.5, max_iter=1000).fit(x[order[:start]], y[order[:start]])
        p = model.predict_proba(x[order[start:end]])
        bits -= np.log2(p[np.arange(end - start), y[order[start:end]].astype(int)]).sum()
    assert ratio == pytest.approx(bits / 40, abs=1e-4)


def test_windows_of_one_document_do_not_tell_each_others_labels() -> None:
    """What tells documents apart makes labels short that were learnt of some windows of each, and no others."""
    generator = np.random.default_rng(0)
    documents = generator.permutation(np.repeat(np.arange(24), 5))
    x = generator.normal(size=(24, 40))[documents] + 0.01 * generator.normal(size=(120, 40))
    y = (generator.permutation(np.arange(24)) % 2)[documents].astype(np.float64)
    assert code_length_ratio(logistic, x, Examples(y, np.arange(120), 2), 10.0, 0) < 0.7
    assert code_length_ratio(logistic, x, Examples(y, documents, 2), 10.0, 0) > 0.9


@pytest.mark.parametrize("name", ["logistic", "prototype"])
def test_random_labels_have_a_code_length_of_about_1_and_no_accuracy_above_the_base_rate(name: str) -> None:
    generator = np.random.default_rng(1)
    x, other = generator.normal(size=(240, 60)), generator.normal(size=(400, 60))
    y, wanted = (generator.permutation(np.arange(n) % 2).astype(np.float64) for n in (240, 400))
    inputs, fit, strength = fitted(METHODS[name], x, examples(y, 2), None, 0)
    assert code_length_ratio(METHODS[name], inputs.z, examples(y, 2), strength, 0) == pytest.approx(1.0, abs=0.05)
    accuracy = (fit.scores(inputs.turned(other)).argmax(1) == wanted).mean()
    assert accuracy == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("windows", [1, 15])
def test_random_labels_of_documents_get_no_shorter_by_the_number_of_their_windows(windows: int) -> None:
    """All windows of a document lie close together, and have its label."""
    generator = np.random.default_rng(3)
    labels = generator.permutation(np.arange(40) % 2).astype(np.float64)
    documents = generator.permutation(np.repeat(np.arange(40), windows))
    x = generator.normal(size=(40, 16))[documents] + 0.1 * generator.normal(size=(40 * windows, 16))
    assert code_length_ratio(logistic, x, Examples(labels[documents], documents, 2), 30.0, 0) > 0.95


@pytest.mark.parametrize("name", ["logistic", "prototype"])
def test_labels_that_are_in_the_states_get_short(name: str) -> None:
    generator = np.random.default_rng(1)
    y = generator.permutation(np.arange(240) % 2).astype(np.float64)
    x = generator.normal(size=(240, 60)) + 4.0 * y[:, None]
    inputs, _, strength = fitted(METHODS[name], x, examples(y, 2), None, 0)
    assert code_length_ratio(METHODS[name], inputs.z, examples(y, 2), strength, 0) < 0.1


def test_features_scaled_10_to_1_have_variance_shares_of_100_to_1_and_are_read_equally_well() -> None:
    generator = np.random.default_rng(3)
    order = generator.permutation(400)
    first, second = order % 2, order // 2 % 2
    x = np.stack([10.0 * (first - 0.5), second - 0.5], axis=1) @ np.linalg.qr(generator.normal(size=(2, 2)))[0]
    x = np.concatenate([x, 0.01 * generator.normal(size=(400, 6))], axis=1)
    shares = [variance_share(x, y.astype(np.float64), 2) for y in (first, second)]
    assert shares[0] / shares[1] == pytest.approx(100.0, rel=0.05)
    for y in (first, second):
        _, scores = solved(logistic, x[:300], y[:300].astype(np.float64), 2, 1.0, x[300:])
        assert (scores.argmax(1) == y[300:]).all()


def test_the_variance_share_of_numbers_is_the_r_squared_of_the_coordinates_on_them() -> None:
    x, _ = data(5, n=30)
    y = np.random.default_rng(8).normal(size=30)
    fitted_states = LinearRegression().fit(y[:, None], x).predict(y[:, None])
    assert variance_share(x, y, 1) == pytest.approx(r2_score(x, fitted_states, multioutput="variance_weighted"))
    assert variance_share(np.ones((4, 3)), np.arange(4.0), 1) == 0.0


def test_labels_are_dealt_anew_to_documents_and_not_to_their_windows() -> None:
    documents = np.repeat(np.arange(30), np.arange(30) % 4 + 1)
    y = (np.arange(30) % 3)[documents].astype(np.float64)
    dealt = job._dealt(Examples(y, documents, 3), np.random.default_rng(0))
    of_documents = [set(dealt[documents == document]) for document in range(30)]
    assert all(len(labels) == 1 for labels in of_documents)
    assert sorted(label for labels in of_documents for label in labels) == sorted(np.arange(30) % 3)
    assert (dealt != y).any()
