"""Scores of neurons by labelled texts against scipy, scikit-learn and loops."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_ind
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from patchclamp_server.analysis.neurons.localize import average_precision, contrast_set, sparse_probe, welch_t
from patchclamp_server.analysis.neurons.localize.activation_entropy import entropies
from patchclamp_server.analysis.neurons.localize.sparse_probe import Kinds, Ranker, fit, ranked

TEXTS, UNITS = 40, 12


@pytest.fixture
def activations() -> torch.Tensor:
    """[texts, units]: unit 0 is constant, unit 1 has ties, unit 2 is larger in texts of the target, unit 3 smaller."""
    x = torch.randn(TEXTS, UNITS, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.1
    x[:, 1] = (x[:, 1] > 0).float()
    x[:, 2] += 2 * TARGET
    x[:, 3] -= 2 * TARGET
    return x


TARGET = torch.arange(TEXTS) % 3 == 0


def test_average_precision_is_that_of_scikit_learn_also_with_ties(activations: torch.Tensor) -> None:
    found = average_precision.scores(activations, TARGET)
    for unit in range(UNITS):
        x, y = activations[:, unit].numpy(), TARGET.numpy()
        expected = max(average_precision_score(y, x), average_precision_score(y, -x))
        assert float(found[unit]) == pytest.approx(expected, abs=1e-6)
    assert float(found[0]) == pytest.approx(float(TARGET.float().mean()))


def test_average_precision_is_the_same_in_pieces(activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = average_precision.scores(activations, TARGET)
    monkeypatch.setattr(average_precision, "UNITS_AT_ONCE", 5)
    assert torch.equal(average_precision.scores(activations, TARGET), whole)


def test_welch_t_is_that_of_scipy(activations: torch.Tensor) -> None:
    found = welch_t.scores(activations, TARGET)
    expected = ttest_ind(activations[TARGET].double(), activations[~TARGET].double(), equal_var=False).statistic
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)


def test_welch_t_of_constant_units_is_a_number(activations: torch.Tensor) -> None:
    activations[:, 1] = TARGET.float()
    found = welch_t.scores(activations, TARGET)
    assert found[0] == 0.0
    assert found[1] == torch.finfo(torch.float32).max


def test_the_contrast_set_is_that_of_a_loop_over_subsets(activations: torch.Tensor) -> None:
    documents = torch.arange(TEXTS)
    found = contrast_set.scores(activations, TARGET, documents, z=1.0, subsets=3, agreement=2, seed=5)
    dealt = contrast_set.dealt_out(TARGET, documents, 3, 5)
    for unit in range(1, UNITS):
        z = []
        for subset in range(3):
            a, b = (activations[(dealt == subset) & kind, unit].double().numpy() for kind in (TARGET, ~TARGET))
            z.append((a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        expected = np.mean(z) if sum(each >= 1.0 for each in z) >= 2 else -math.inf
        assert float(found[unit]) == pytest.approx(expected, rel=1e-5)
    assert found[2] > 0
    assert found[0] == -torch.inf


def test_subsets_have_whole_documents_and_as_many_of_each_kind() -> None:
    documents = torch.arange(TEXTS) // 2
    target = documents % 2 == 0
    dealt = contrast_set.dealt_out(target, documents, 5, 0)
    assert torch.equal(dealt[0::2], dealt[1::2])
    for kind in (target, ~target):
        assert torch.bincount(dealt[kind]).tolist() == [4] * 5


def test_entropy_and_the_quantile_rule_are_those_of_loops() -> None:
    p = torch.rand(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    p[:, 7] = 0.0
    p[:, 8] = torch.tensor([0.9, 0.0, 0.0])
    found = entropies(p, activity=0.8, count=10)
    bound = np.quantile(p.numpy(), 0.8, method="lower")
    assert found.bound == bound
    entropy = {}
    for unit in range(50):
        own = p[:, unit].numpy()
        q = own / own.sum() if own.sum() else own
        expected = -sum(each * math.log(each) for each in q if each > 0)
        assert float(found.entropy[unit]) == pytest.approx(expected, abs=1e-12)
        if own.max() >= bound:
            entropy[unit] = expected
    specific = sorted(entropy, key=lambda unit: entropy[unit])[:10]
    assert specific[0] == 8
    for label in range(3):
        scores = found.scores(label)
        own = {unit for unit in range(50) if scores[unit] != -torch.inf}
        assert own == {unit for unit in specific if p[label, unit] >= bound}
        assert all(float(scores[unit]) == pytest.approx(-entropy[unit], abs=1e-6) for unit in own)


def test_a_unit_is_in_no_set_of_a_label_in_which_it_is_never_active() -> None:
    p = torch.zeros(2, 100, dtype=torch.float64)
    p[0, 3] = 0.5
    found = entropies(p, activity=0.5, count=5)
    assert found.bound == 0.0
    assert found.scores(0).argmax() == 3
    assert found.scores(1).eq(-torch.inf).all()


def kinds(activations: torch.Tensor) -> Kinds:
    return Kinds(activations.numpy(), TARGET.numpy())


def by_ranker(ranker: Ranker, activations: torch.Tensor) -> NDArray[np.float64]:
    return sparse_probe.scores(ranker, kinds(activations), seed=0)


def test_mean_difference_is_that_of_a_loop(activations: torch.Tensor) -> None:
    found = by_ranker(Ranker.MEAN_DIFFERENCE, activations)
    for unit in range(1, UNITS):
        a, b = (activations[kind, unit].double().numpy() for kind in (TARGET, ~TARGET))
        within = math.sqrt((((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / TEXTS)
        assert found[unit] == pytest.approx(abs(a.mean() - b.mean()) / within)
    assert found[0] == 0.0


def test_f_is_that_of_scikit_learn(activations: torch.Tensor) -> None:
    found = by_ranker(Ranker.F, activations)
    expected, _ = f_classif(activations[:, 1:].double().numpy(), TARGET.numpy())
    np.testing.assert_allclose(found[1:], expected)
    assert found[0] == 0.0


@pytest.mark.parametrize("ranker", [Ranker.MEAN_DIFFERENCE, Ranker.F])
def test_a_unit_that_is_constant_in_each_kind_and_differs_is_the_best(
    ranker: Ranker, activations: torch.Tensor
) -> None:
    activations[:, 5] = TARGET.float()
    assert ranked(ranker, kinds(activations), 0)[0] == 5


def test_mutual_information_is_that_of_counts(activations: torch.Tensor) -> None:
    found = by_ranker(Ranker.MUTUAL_INFORMATION, activations)
    for unit in (0, 1, 2, 3, 4):
        x = activations[:, unit].tolist()
        edges = [sorted(x)[TEXTS * b // sparse_probe.BINS] for b in range(1, sparse_probe.BINS)]
        pairs = [(sum(value >= edge for edge in edges), bool(y)) for value, y in zip(x, TARGET, strict=True)]
        expected = 0.0
        for b, y in set(pairs):
            joint = pairs.count((b, y)) / TEXTS
            marginals = sum(p[0] == b for p in pairs) * sum(p[1] == y for p in pairs) / TEXTS**2
            expected += joint * math.log(joint / marginals)
        assert found[unit] == pytest.approx(expected, abs=1e-12)
    assert found[0] == 0.0


def test_l1_is_that_of_scikit_learn_among_the_best_by_mean_difference(
    activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_probe, "PREFILTERED", 6)
    found = by_ranker(Ranker.L1, activations)
    first = np.argsort(-by_ranker(Ranker.MEAN_DIFFERENCE, activations), kind="stable")[:6]
    x = activations[:, first].double().numpy()
    model = LogisticRegression(l1_ratio=1.0, solver="liblinear", class_weight="balanced", max_iter=200, random_state=0)
    model.fit((x - x.mean(0)) / x.std(0), TARGET.numpy())
    np.testing.assert_allclose(found[first], np.abs(model.coef_[0]))
    assert not found[[u for u in range(UNITS) if u not in first]].any()


@pytest.mark.parametrize("ranker", [Ranker.MEAN_DIFFERENCE, Ranker.F, Ranker.MUTUAL_INFORMATION])
def test_ranks_are_the_same_in_pieces(
    ranker: Ranker, activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = by_ranker(ranker, activations)
    monkeypatch.setattr(sparse_probe, "UNITS_AT_ONCE", 5)
    np.testing.assert_array_equal(by_ranker(ranker, activations), whole)


def test_a_probe_is_the_logistic_regression_on_standardised_units(activations: torch.Tensor) -> None:
    train, test = slice(0, 28), slice(28, None)
    x, y = activations.double().numpy(), TARGET.numpy()
    units = [2, 5, 0]
    mine = Kinds(activations[train].numpy(), y[train])
    found = fit(mine, Kinds(activations[test].numpy(), y[test]), units, seed=0)
    own = x[train][:, units]
    deviation = np.where(own.std(0) > 1e-9, own.std(0), 1.0)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit((own - own.mean(0)) / deviation, y[train])
    predicted = model.predict((x[test][:, units] - own.mean(0)) / deviation)
    np.testing.assert_allclose(found.weights, model.coef_[0], atol=1e-4)
    assert found.intercept == pytest.approx(float(model.intercept_[0]), abs=1e-4)
    expected = [score(y[test], predicted) for score in (f1_score, precision_score, recall_score)]
    assert [found.f1, found.precision, found.recall] == pytest.approx(expected)
