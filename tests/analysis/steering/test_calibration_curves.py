"""What a dose-response curve is made of and read by: repetition, distinct tokens, intervals, safe range, knee."""

import math

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from patchclamp_server.analysis.neurons.intervals import Items, interval_of
from patchclamp_server.analysis.steering.calibration.applications import default_strengths
from patchclamp_server.analysis.steering.calibration.coherence import expectation_adjusted_distinct, repetition
from patchclamp_server.analysis.steering.calibration.job import random_vectors
from patchclamp_server.analysis.steering.calibration.knee import Dose, best_knee, knee, safe_range
from patchclamp_server.analysis.steering.calibration.word_classifier import WordClassifier
from patchclamp_server.interventions.safe_strengths import Application


def test_repetition_counts_4_grams_that_came_before():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    # 1234 2341 3412 4123 1234: one of five.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)


def test_the_expected_number_of_distinct_tokens_is_that_of_draws_from_the_vocabulary():
    generator = np.random.default_rng(0)
    draws = generator.integers(0, 50, size=(20_000, 30))
    expected = np.mean([len(set(row)) for row in draws.tolist()])
    ids = draws[0].tolist()
    assert expectation_adjusted_distinct(ids, 50) == pytest.approx(len(set(ids)) / expected, rel=2e-3)
    assert expectation_adjusted_distinct([3], 49_152) == pytest.approx(1.0)
    assert expectation_adjusted_distinct([3] * 4, 49_152) == pytest.approx(0.25, rel=1e-3)


def test_an_interval_has_the_middle_of_resampled_weighted_means():
    generator = np.random.default_rng(1)
    x, w = generator.normal(1.0, 1.0, 40), generator.integers(1, 9, 40).astype(float)
    found = interval_of(Items(torch.tensor(x * w), torch.tensor(w)), lambda mean: mean, seed=3)
    drawn = generator.integers(0, 40, size=(4000, 40))
    means = (x * w)[drawn].sum(1) / w[drawn].sum(1)
    assert found.mean == pytest.approx((x * w).sum() / w.sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.05)


def test_the_interval_of_a_perplexity_is_that_of_the_exponential():
    items = Items(torch.tensor([2.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64))
    found = interval_of(items, torch.exp, seed=0)
    assert (found.mean, found.low, found.high) == pytest.approx((math.exp(3), math.exp(2), math.exp(4)))


def dose(strength: float, effect: float = 0.0, *, safe: bool = True, random: float = 0.0) -> Dose:
    return Dose(strength, safe, effect, random)


def test_the_safe_range_ends_before_the_first_strength_that_breaks_the_text():
    doses = [dose(s, safe=abs(s) not in (3.0, 5.0)) for s in (4.0, -1.0, 1.0, 2.0, 3.0, -2.0, -5.0)]
    assert safe_range(doses) == (-2.0, 2.0)
    assert safe_range([dose(1.0, safe=False), dose(2.0)]) == (0.0, 0.0)
    assert safe_range([dose(-1.0), dose(0.0)]) == (-1.0, 0.0)


def test_the_knee_of_a_planted_curve_is_found():
    strengths = np.linspace(0.25, 8.0, 32)
    planted = np.minimum(strengths, 2.5)
    assert knee([dose(s, e) for s, e in zip(strengths, planted, strict=True)]).strength == 2.5  # type: ignore[union-attr]
    # Of 1 - exp(-s) the lead over a straight line is largest where its slope is that of the line.
    top = 1 - math.exp(-8.0)
    found = knee([dose(s, 1 - math.exp(-s)) for s in strengths])
    assert found is not None
    assert found.strength == pytest.approx(math.log(8.0 / top), abs=0.25)


def test_a_straight_or_rising_curve_has_its_knee_at_its_end_and_a_falling_one_none():
    for power in (1.0, 2.0):
        found = knee([dose(s, s**power) for s in (1.0, 2.0, 3.0)])
        assert found is not None
        assert found.strength == 3.0
    assert knee([dose(1.0, -1.0), dose(2.0, 0.0)]) is None
    assert knee([]) is None


def test_the_best_layer_is_that_whose_knee_is_farthest_beyond_random_vectors():
    curves = {
        3: [dose(1.0, 2.0, random=0.1), dose(2.0, 2.1, random=0.2)],
        4: [dose(1.0, 5.0, random=4.9), dose(2.0, 5.1, random=5.0)],
        5: [dose(1.0, 9.0, safe=False), dose(2.0, 9.0)],
    }
    found = best_knee(curves)
    assert found is not None
    assert (found.layer, found.dose.strength) == (3, 1.0)
    assert best_knee({5: curves[5]}) is None


def test_a_vector_that_works_backwards_has_its_knee_below_zero():
    found = best_knee({1: [dose(s, -s) for s in (-2.0, -1.0, 1.0, 2.0)]})
    assert found is not None
    assert found.dose.strength == -2.0


def test_random_vectors_have_the_norm_of_the_vector_and_depend_on_layer_and_seed():
    v = torch.linspace(-3, 5, 64)
    drawn = random_vectors(v, 5, layer=2, seed=7)
    assert [float(each.norm()) for each in drawn] == pytest.approx([float(v.norm())] * 5, rel=1e-6)
    assert torch.equal(drawn[0], random_vectors(v, 1, layer=2, seed=7)[0])
    assert not torch.equal(drawn[0], random_vectors(v, 1, layer=3, seed=7)[0])
    assert not torch.equal(drawn[0], random_vectors(v, 1, layer=2, seed=8)[0])


def test_default_strengths_change_a_tenth_to_twice_the_norm():
    added = default_strengths(Application.ADD, vector_norm=4.0, activation_norm=20.0)
    assert (added[0], added[-1], len(added)) == (0.5, 10.0, 8)
    angles = default_strengths(Application.ROTATE_TOWARDS, 4.0, 20.0)
    assert 2 * math.sin(angles[0] / 2) == pytest.approx(0.1, rel=1e-2)
    assert angles[-1] <= math.pi
    assert angles[-1] == pytest.approx(math.pi, rel=1e-2)
    assert default_strengths(Application.REPLACE, 4.0, 20.0)[-1] == 1.0


def test_the_classifier_is_a_logistic_regression_on_counts_of_words():
    texts = ["good good day", "good sun", "a good time", "fine good", "bad day", "bad rain", "a bad time", "no bad"]
    labels = [True] * 4 + [False] * 4
    found = WordClassifier(texts, labels, seed=0)
    counts = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(counts.fit_transform(texts), labels)
    for text in ("a good bad day", "GOOD", ""):
        assert found.probability(text) == pytest.approx(model.predict_proba(counts.transform([text]))[0, 1])
    assert found.heldout_accuracy == 1.0
    with pytest.raises(ValueError, match="at least"):
        WordClassifier(texts[:6], labels[:6], seed=0)
    with pytest.raises(ValueError, match="no word is left"):
        # Whichever part has the only word: its accuracy would be no number.
        WordClassifier(["!!!"] * 4 + ["word"] + ["???"] * 4, [True] * 4 + [False] * 5, seed=0)


def test_the_classifier_is_at_chance_on_held_out_texts_of_random_labels():
    generator = np.random.default_rng(2)
    texts = [" ".join(f"w{i}" for i in generator.integers(0, 400, 12)) for _ in range(80)]
    found = WordClassifier(texts, (np.arange(80) % 2 == 0).tolist(), seed=0)
    assert found.heldout_accuracy == pytest.approx(0.5, abs=0.2)
